"""What the search for the circuit of a concept finds."""

from dataclasses import dataclass
from statistics import fmean

from patchclamp.results.artifacts import Artifact, LayerEvidence
from patchclamp.results.heads import HeadScore
from patchclamp.results.jobs import Progress
from patchclamp.results.neurons import StoredNeurons
from patchclamp.results.record import Record


@dataclass(frozen=True)
class ZeroedSets(Record):
    """Holds what is left of held-out scenarios without a set of the circuit, and without each random one of its size.

    The message of the same name describes the figures.
    """

    projection: float
    separation: float
    random_projections: tuple[float, ...]
    random_separations: tuple[float, ...]

    @property
    def random_separation(self) -> float:
        """The mean over the random sets."""
        return fmean(self.random_separations)


@dataclass(frozen=True)
class FoundConceptCircuit(Record):
    """Holds a stored vector, neuron set and head set, and what zeroing them does.

    layers: evidence of the vector; best_layer is the one at which neurons and heads are sought. best_heads: those of
    the circuit, scored by what they write along the direction. separation: of held-out scenarios how far the target's
    texts project on it, less the mean of all values; neurons_zeroed, heads_zeroed, both_zeroed: what is left of that.
    """

    vector: Artifact
    layers: tuple[LayerEvidence, ...]
    best_layer: int
    neurons: StoredNeurons
    heads: Artifact
    best_heads: tuple[HeadScore, ...]
    projection: float
    separation: float
    neurons_zeroed: ZeroedSets
    heads_zeroed: ZeroedSets
    both_zeroed: ZeroedSets
    warnings: tuple[str, ...] = ()

    @property
    def zeroed(self) -> dict[str, ZeroedSets]:
        """The three, by what is zeroed: "neurons", "heads" and "both"."""
        return {"neurons": self.neurons_zeroed, "heads": self.heads_zeroed, "both": self.both_zeroed}


ConceptCircuitEvent = Progress | FoundConceptCircuit
