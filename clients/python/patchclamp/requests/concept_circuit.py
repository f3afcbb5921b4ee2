"""Requests of FindConceptCircuit."""

from collections.abc import Iterable, Mapping, Sequence
from typing import TypeAlias

from patchclamp.fields import build, build_as, several, shown
from patchclamp.names import POOLINGS, SITES, PoolingName, SiteName, value_or_unspecified
from patchclamp.prompts import PromptLike, prompt
from patchclamp.requests.artifacts import StoredOptions
from patchclamp.v1 import neuron_pb2, steering_pb2

# The texts of one context, by value of the concept.
ScenarioLike: TypeAlias = Mapping[str, "str | Iterable[PromptLike]"]


class ConceptCircuitOptions(StoredOptions, total=False):
    """Options of the search for the circuit of a concept, besides StoredOptions.

    tags: each becomes "<tag>-vector", "<tag>-neurons" and "<tag>-heads". site: a residual site, by default resid_post.
    layers: by default every layer. pooling: which token stands for a text, by default the last. holdout_fraction: share
    of the scenarios kept out, by default 0.25. neurons, heads: at most so many, by default 100 and 10. random_sets:
    zeroed beside them, by default 10.
    """

    site: SiteName | None
    layers: Iterable[int]
    pooling: PoolingName | None
    holdout_fraction: float | None
    neurons: int
    heads: int
    random_sets: int
    seed: int
    model: str


def find_concept_circuit(
    scenarios: Iterable[ScenarioLike],
    target: str,
    *,
    site: SiteName | None = None,
    layers: Iterable[int] = (),
    pooling: PoolingName | None = None,
    holdout_fraction: float | None = None,
    neurons: int = 0,
    heads: int = 0,
    random_sets: int = 0,
    seed: int = 0,
    description: str = "",
    tags: Sequence[str] = (),
    replace_tags: bool = False,
    model: str = "",
) -> steering_pb2.FindConceptCircuitRequest:
    """Returns a request for the circuit of a concept.

    scenarios: of each context its texts by value of the concept, one or several; all have the same values. target: the
    value whose direction is sought.
    """
    listed = several(scenarios, "scenarios", "texts by value")
    return build(
        steering_pb2.FindConceptCircuitRequest,
        model=model,
        scenarios=[_scenario(each, f"scenarios[{i}]") for i, each in enumerate(listed)],
        target=target,
        site=value_or_unspecified(SITES, site, "site"),
        layers=layers,
        pooling=value_or_unspecified(POOLINGS, pooling, "pooling"),
        holdout_fraction=holdout_fraction,
        neurons=neurons,
        heads=heads,
        random_sets=random_sets,
        seed=seed,
        description=description,
        tags=tags,
        replace_tags=replace_tags,
    )


def _scenario(scenario: object, field: str) -> steering_pb2.ConceptScenario:
    if not isinstance(scenario, Mapping):
        raise TypeError(f"{field}: expected texts by value, got {shown(scenario)}")
    return steering_pb2.ConceptScenario(
        values=[_texts(value, texts, f"{field}[{value!r}]") for value, texts in scenario.items()]
    )


def _texts(value: str, texts: object, field: str) -> neuron_pb2.LabelledTexts:
    listed = [texts] if isinstance(texts, str) else several(texts, field, "a text")
    prompts = [prompt(each, field=f"{field}[{i}]") for i, each in enumerate(listed)]
    return build_as({"label": field}, neuron_pb2.LabelledTexts, label=value, prompts=prompts)
