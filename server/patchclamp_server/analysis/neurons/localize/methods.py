"""What LocalizeNeurons is asked, and what it answers. A method is a file of this package, or of the one above."""

from dataclasses import dataclass
from typing import TypeAlias

from torch import Tensor

from patchclamp_server.analysis.neurons.localize.sparse_probe import Probe, Ranker
from patchclamp_server.analysis.neurons.stored import StoredSet
from patchclamp_server.analysis.neurons.targets import Example
from patchclamp_server.analysis.neurons.texts import TextSource
from patchclamp_server.artifacts.neuron_sets import Neuron
from patchclamp_server.artifacts.types import Tags
from patchclamp_server.interventions.pooling import Pooling
from patchclamp_server.model.sites import Site


@dataclass(frozen=True, eq=False)
class AveragePrecision:
    """average_precision.py. `target`: number of a label."""

    texts: TextSource
    target: int
    pooling: Pooling = Pooling.LAST_TOKEN


@dataclass(frozen=True, eq=False)
class ActivationEntropy:
    """activation_entropy.py. `targets`: labels whose sets are stored; none are all."""

    texts: TextSource
    threshold: float = 0.0
    activity: float = 0.95
    targets: tuple[int, ...] = ()


@dataclass(frozen=True, eq=False)
class Gradients:
    """gradients.py above, or integrated.py with `integrated`. Without `all_tokens`, the last token of each prompt."""

    facts: tuple[Example, ...]
    controls: tuple[Example, ...] = ()
    integrated: bool = False
    all_tokens: bool = False
    max_steps: int = 512
    completeness: float = 0.01


@dataclass(frozen=True, eq=False)
class WelchT:
    """welch_t.py. `contrast`: a label, or None for all others."""

    texts: TextSource
    target: int
    contrast: int | None = None
    pooling: Pooling = Pooling.MEAN


@dataclass(frozen=True, eq=False)
class ContrastSet:
    """contrast_set.py."""

    texts: TextSource
    target: int
    contrast: int | None = None
    z: float = 3.0
    subsets: int = 5
    agreement: int = 5
    pooling: Pooling = Pooling.MEAN


@dataclass(frozen=True, eq=False)
class SparseProbes:
    """sparse_probe.py."""

    texts: TextSource
    target: int
    ranker: Ranker = Ranker.MEAN_DIFFERENCE
    k: tuple[int, ...] = (1, 2, 4, 8, 16, 32, 64, 128)
    by_layer: bool = False
    pooling: Pooling = Pooling.MAX


Method: TypeAlias = AveragePrecision | ActivationEntropy | Gradients | WelchT | ContrastSet | SparseProbes


@dataclass(frozen=True, eq=False)
class Localization:
    """`name`: of the method, in words of the contract. `size`: neurons of a set, or None for the method's own.

    `tag_names`: each set has these, or where several are stored "<tag>-<label>".
    """

    name: str
    method: Method
    layers: tuple[int, ...]
    site: Site = Site.MLP_POST
    size: int | None = None
    holdout_fraction: float = 0.25
    random_sets: int = 20
    seed: int = 0
    description: str = ""
    tag_names: tuple[str, ...] = ()
    replace_tags: bool = False

    @property
    def set_labels(self) -> tuple[str, ...]:
        """Labels of the sets that are stored, of a method that stores several."""
        if not isinstance(self.method, ActivationEntropy):
            return ()
        labels = self.method.texts.corpus.labels
        return tuple(labels[i] for i in self.method.targets or range(len(labels)))

    def tags_of(self, label: str) -> Tags:
        """Returns the tags of the set of a label."""
        several = len(self.set_labels) > 1
        return Tags(tuple(f"{n}-{label}" if several else n for n in self.tag_names), self.replace_tags)

    @property
    def tags(self) -> Tags:
        """Of all sets."""
        names = [name for label in self.set_labels or ("",) for name in self.tags_of(label).names]
        return Tags(tuple(names), self.replace_tags)


@dataclass(frozen=True, eq=False)
class Judged:
    """A set and what it is judged by: `measure` says what; `heldout` for the set, `random` for each random set.

    `layer_mean` and `layer_max`: scores of all neurons of each layer.
    """

    label: str
    stored: StoredSet
    measure: str
    heldout: float
    random: tuple[float, ...]
    layer_mean: tuple[float, ...]
    layer_max: tuple[float, ...]


@dataclass(frozen=True)
class ProbeReport:
    """One probe on k neurons, with the F1 of random ones; `layer` None: of all layers."""

    k: int
    layer: int | None
    probe: Probe
    random_f1: tuple[float, ...]
    neurons: tuple[Neuron, ...]


@dataclass(frozen=True, eq=False)
class Localized:
    sets: tuple[Judged, ...]
    texts: int
    tokens: int
    steps: int = 0
    completeness_gap: float = 0.0
    probes: tuple[ProbeReport, ...] = ()
    warnings: tuple[str, ...] = ()


@dataclass(frozen=True)
class Beside:
    """What a set is judged by, and the same of each random set."""

    heldout: float
    random: tuple[float, ...]


@dataclass(frozen=True, eq=False)
class Scored:
    """What a method found for one label: `scores` float32 [layers, d_ff], -inf where there is no score.

    `judged`: the same measurement of every neuron on what was held out, float32 [layers, d_ff], whose mean a set is
    judged by; or what it was judged by as a whole. `values`, of the same shape: what is stored as values.
    """

    label: str
    scores: Tensor
    measure: str
    judged: Tensor | Beside
    size: int
    values: Tensor | None = None
