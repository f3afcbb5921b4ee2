"""Turns the messages of FindConceptCircuit into the job of analysis/steering/concept_circuit and back.

Refusals name fields.
"""

from collections.abc import Sequence

from patchclamp.v1 import steering_pb2 as pb
from patchclamp_server.analysis.progress import Progress
from patchclamp_server.analysis.steering.concept_circuit.scenarios import Scenarios, ScenarioText
from patchclamp_server.analysis.steering.concept_circuit.search import ConceptCircuitSearch
from patchclamp_server.analysis.steering.concept_circuit.storing import FoundConceptCircuit
from patchclamp_server.analysis.steering.concept_circuit.zeroing import ZeroedSets
from patchclamp_server.analysis.steering.evidence import training_pairs
from patchclamp_server.artifacts.corpora import MAX_LABELS, check_label
from patchclamp_server.artifacts.validation import check_tag
from patchclamp_server.errors import InvalidArgument
from patchclamp_server.interventions.field_checks import count, distinct, known
from patchclamp_server.model.info import ModelInfo
from patchclamp_server.model.sites import Site
from patchclamp_server.rpc.codecs.artifact import decode_label, encode_artifact
from patchclamp_server.rpc.codecs.extraction_inputs import POOLINGS
from patchclamp_server.rpc.codecs.generation import decode_prompt
from patchclamp_server.rpc.codecs.head import encode_score
from patchclamp_server.rpc.codecs.neurons.common import encode_stored
from patchclamp_server.rpc.codecs.progress import encode_progress
from patchclamp_server.rpc.codecs.steering import DEFAULT_HOLDOUT_FRACTION, decode_residual_site, encode_evidence
from patchclamp_server.text.prompt import PromptEncoder

MAX_TEXTS = 4096
DEFAULT_NEURONS, DEFAULT_HEADS = 100, 10
MAX_NEURONS, MAX_HEADS = 100_000, 1000
DEFAULT_RANDOM_SETS, MAX_RANDOM_SETS = 10, 100


def decode_concept_circuit(
    request: pb.FindConceptCircuitRequest, prompts: PromptEncoder, info: ModelInfo
) -> ConceptCircuitSearch:
    """Returns a checked job. Tokenises every text: call it in a thread.

    Raises InvalidArgument, and FailedPrecondition for a chat where the model has no template.
    """
    site = decode_residual_site(request.site, info)
    layers = _layers(request.layers, site, info)
    pooling = known(request.pooling, POOLINGS, "pooling", pb.TokenPooling.keys()[1:])
    fraction = request.holdout_fraction if request.HasField("holdout_fraction") else DEFAULT_HOLDOUT_FRACTION
    if not 0 < fraction < 1:
        raise InvalidArgument("holdout_fraction", f"expected a number between 0 and 1, both excluded, got {fraction:g}")
    most_neurons, most_heads = info.n_layers * info.d_ff, info.n_layers * info.n_heads
    neurons = count(request.neurons, "neurons", high=min(MAX_NEURONS, most_neurons))
    heads = count(request.heads, "heads", high=min(MAX_HEADS, most_heads))
    random_sets = count(request.random_sets or DEFAULT_RANDOM_SETS, "random_sets", low=1, high=MAX_RANDOM_SETS)
    description, tags = decode_label(request)
    job = ConceptCircuitSearch(
        _scenarios(request, fraction, prompts),
        site,
        layers,
        pooling,
        fraction,
        neurons or min(DEFAULT_NEURONS, most_neurons),
        heads or min(DEFAULT_HEADS, most_heads),
        random_sets,
        request.seed,
        description,
        tags.names,
        tags.replace,
    )
    for i, name in enumerate(tags.names):
        check_tag(f"{name}-neurons", f"tags[{i}]")
    return job


def encode_concept_circuit(event: Progress | FoundConceptCircuit) -> pb.FindConceptCircuitResponse:
    if isinstance(event, Progress):
        return encode_progress(event, pb.FindConceptCircuitResponse)
    found = pb.FoundConceptCircuit(
        vector=encode_artifact(event.vector.artifact),
        layers=map(encode_evidence, event.vector.layers),
        best_layer=event.vector.best_layer,
        neurons=encode_stored(event.neurons),
        heads=encode_artifact(event.head_set),
        best_heads=[encode_score(head, score, None, None) for head, score in event.heads],
        projection=event.unzeroed.projection,
        separation=event.unzeroed.separation,
        warnings=event.vector.warnings,
        neurons_zeroed=_encode_zeroed(event.zeroed["neurons"]),
        heads_zeroed=_encode_zeroed(event.zeroed["heads"]),
        both_zeroed=_encode_zeroed(event.zeroed["both"]),
    )
    return pb.FindConceptCircuitResponse(result=found)


def _encode_zeroed(sets: ZeroedSets) -> pb.ZeroedSets:
    return pb.ZeroedSets(
        projection=sets.projection,
        separation=sets.separation,
        random_projections=sets.random_projections,
        random_separations=sets.random_separations,
    )


def _layers(layers: Sequence[int], site: Site, info: ModelInfo) -> tuple[int, ...]:
    """A layer before whose site no neuron writes has no circuit."""
    first = 0 if site is Site.RESID_POST else 1
    if first >= info.n_layers:
        raise InvalidArgument("site", f"no neuron of {info.n_layers} layer writes before {site.value}; name resid_post")
    for i, layer in enumerate(layers):
        count(layer, f"layers[{i}]", low=first, high=info.n_layers - 1)
    return tuple(sorted(distinct(layers, "layers"))) or tuple(range(first, info.n_layers))


def _scenarios(request: pb.FindConceptCircuitRequest, fraction: float, prompts: PromptEncoder) -> Scenarios:
    """Returns the texts; the values have the order of the first scenario."""
    training_pairs(len(request.scenarios), fraction, "scenarios")
    total = sum(len(group.prompts) for scenario in request.scenarios for group in scenario.values)
    if total > MAX_TEXTS:
        raise InvalidArgument("scenarios", f"expected at most {MAX_TEXTS} texts in all, got {total}")
    names = _names(request.scenarios[0], "scenarios[0].values")
    if request.target not in names:
        raise InvalidArgument("target", f"expected one of the values {_listed(names)}, got {request.target!r:.80}")
    texts = []
    for s, scenario in enumerate(request.scenarios):
        field = f"scenarios[{s}].values"
        own = _names(scenario, field)
        if sorted(own) != sorted(names):
            message = f"expected the values of scenarios[0], {_listed(names)}; got {_listed(own)}"
            raise InvalidArgument(field, message)
        for i, group in enumerate(scenario.values):
            if not group.prompts:
                raise InvalidArgument(f"{field}[{i}].prompts", "expected at least one text")
            for j, prompt in enumerate(group.prompts):
                encoded = decode_prompt(prompt, prompts, f"{field}[{i}].prompts[{j}]")
                texts.append(ScenarioText(encoded.ids, s, names.index(group.label), encoded.roles))
    return Scenarios(tuple(texts), tuple(names), names.index(request.target))


def _names(scenario: pb.ConceptScenario, field: str) -> list[str]:
    if not 2 <= len(scenario.values) <= MAX_LABELS:
        raise InvalidArgument(field, f"expected texts of 2 to {MAX_LABELS} values, got {len(scenario.values)}")
    names: list[str] = []
    for i, group in enumerate(scenario.values):
        path = f"{field}[{i}].label"
        try:
            check_label(group.label)
        except ValueError as error:
            raise InvalidArgument(path, str(error)) from error
        if group.label in names:
            before = f"{field}[{names.index(group.label)}]"
            raise InvalidArgument(path, f"{group.label!r:.80} is already the value of {before}")
        names.append(group.label)
    return names


def _listed(names: Sequence[str]) -> str:
    return f"{', '.join(map(repr, names)):.400}"
