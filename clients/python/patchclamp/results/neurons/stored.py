"""Neurons with what was measured of them, and sets of them that are stored."""

from dataclasses import dataclass

from patchclamp.neurons import Neuron
from patchclamp.results.artifacts import Artifact
from patchclamp.results.record import Record


@dataclass(frozen=True)
class ScoredNeuron(Record):
    """Holds the score of one neuron. value: what an edit sets it to by default, None where the set has no values."""

    neuron: Neuron
    score: float
    value: float | None = None


@dataclass(frozen=True)
class LayerCount(Record):
    layer: int
    neurons: int


@dataclass(frozen=True)
class StoredNeurons(Record):
    """Holds a stored neuron set.

    best: best first, at most 1,000 of its `neurons`. layers: those that have any.
    """

    artifact: Artifact
    neurons: int
    best: tuple[ScoredNeuron, ...]
    layers: tuple[LayerCount, ...]


@dataclass(frozen=True)
class NeuronSetComparison(Record):
    """Compares the neuron sets at `first` and `second`; the message of the same name describes the figures."""

    first: int
    second: int
    jaccard: float
    overlap_coefficient: float
    common: int
    expected_common: float
    p_value: float
    common_by_layer: tuple[LayerCount, ...]
