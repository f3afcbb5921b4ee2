"""Neurons that a method localised, with their evidence on what was held out beside random sets."""

from dataclasses import dataclass

from patchclamp.neurons import Neuron
from patchclamp.results.neurons.stored import StoredNeurons
from patchclamp.results.record import Record


@dataclass(frozen=True)
class LocalizedSet(Record):
    """Holds the set of one label, "" for facts.

    heldout, random: the `measure` on held-out texts, of the set and of each random one. layer_mean, layer_max: scores
    of all neurons of each layer that was asked for.
    """

    label: str
    stored: StoredNeurons
    measure: str
    heldout: float
    random: tuple[float, ...]
    random_mean: float
    random_deviation: float
    layer_mean: tuple[float, ...]
    layer_max: tuple[float, ...]


@dataclass(frozen=True)
class SparseProbe(Record):
    """Holds the held-out scores of a probe on k neurons, beside probes on random ones. layer: None is all layers."""

    k: int
    layer: int | None
    f1: float
    precision: float
    recall: float
    random_f1_mean: float
    random_f1_deviation: float
    neurons: tuple[Neuron, ...]
    weights: tuple[float, ...]
    intercept: float


@dataclass(frozen=True)
class LocalizedNeurons(Record):
    """Holds the sets that were found, one for each label.

    steps, completeness_gap: of integrated gradients. probes: of sparse probes.
    """

    sets: tuple[LocalizedSet, ...]
    texts: int
    tokens: int
    steps: int
    completeness_gap: float
    probes: tuple[SparseProbe, ...]
    warnings: tuple[str, ...]
