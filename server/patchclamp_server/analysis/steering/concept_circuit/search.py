"""What is asked of a search for the circuit of a concept, and what of it cannot be done."""

from collections.abc import Mapping
from dataclasses import dataclass

from patchclamp_server.analysis.steering.concept_circuit.scenarios import Scenarios
from patchclamp_server.analysis.steering.evidence import shuffled, training_pairs
from patchclamp_server.analysis.steering.examples import MAX_ACTIVATION_BYTES
from patchclamp_server.artifacts.types import Tags
from patchclamp_server.errors import InvalidArgument
from patchclamp_server.interventions.pooling import Pooling
from patchclamp_server.model.info import ModelInfo
from patchclamp_server.model.sites import Site

MAX_REQUESTS = 200_000
# What is zeroed together: (neurons, heads).
PARTS: Mapping[str, tuple[bool, bool]] = {"neurons": (True, False), "heads": (False, True), "both": (True, True)}
ARTIFACTS = ("vector", "neurons", "heads")


@dataclass(frozen=True, eq=False)
class ConceptCircuitSearch:
    """`layers` are 0-based, ascending, at least one, and have neurons and heads before the site. `tag_names` become
    "<name>-vector", "<name>-neurons" and "<name>-heads"."""

    scenarios: Scenarios
    site: Site
    layers: tuple[int, ...]
    pooling: Pooling = Pooling.LAST_TOKEN
    holdout_fraction: float = 0.25
    neurons: int = 100
    heads: int = 10
    random_sets: int = 10
    seed: int = 0
    description: str = ""
    tag_names: tuple[str, ...] = ()
    replace_tags: bool = False

    @property
    def tags(self) -> Tags:
        """The tags of all artifacts."""
        return Tags(tuple(tag for kind in ARTIFACTS for tag in self.tags_of(kind).names), self.replace_tags)

    def tags_of(self, artifact: str) -> Tags:
        return Tags(tuple(f"{name}-{artifact}" for name in self.tag_names), self.replace_tags)


@dataclass(frozen=True, eq=False)
class Split:
    """Numbers of scenarios: whole ones are held out, so that what is measured is of contexts that were not seen."""

    training: list[int]
    heldout: list[int]

    @classmethod
    def of(cls, job: ConceptCircuitSearch) -> "Split":
        """Raises InvalidArgument on too few scenarios."""
        n = len(job.scenarios)
        training, order = training_pairs(n, job.holdout_fraction, "scenarios"), shuffled(n, job.seed)
        return cls(order[:training], order[training:])


def check_sizes(job: ConceptCircuitSearch, split: Split, info: ModelInfo) -> None:
    # These are the states of all texts, and copies of them in pairs.
    needed = 2 * 4 * len(job.scenarios.texts) * len(job.layers) * info.sites[job.site]
    if needed > MAX_ACTIVATION_BYTES:
        message = f"the activations need {needed} bytes, the bound is {MAX_ACTIVATION_BYTES}; name fewer"
        raise InvalidArgument("layers", message)
    requests = len(job.scenarios.of(split.heldout)) * (1 + len(PARTS) * (1 + job.random_sets))
    if requests > MAX_REQUESTS:
        message = f"zeroing all sets takes {requests} requests; at most {MAX_REQUESTS} are run"
        raise InvalidArgument("random_sets", message)
