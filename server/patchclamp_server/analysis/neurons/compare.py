"""How much neuron sets have in common, by stated definitions.

    jaccard                |A and B| / |A or B|
    overlap coefficient    |A and B| / min(|A|, |B|)
    expected               Σ_l a_l b_l / d_ff     neurons in common of random sets with a_l and b_l neurons in layer l
    p                      P(X ≥ |A and B|),  X = Σ_l Hypergeometric(d_ff, a_l, b_l)

The distribution of X is the convolution of those of the layers, not sampled. Tails in which every probability is below
NEGLIGIBLE are left out on the way, so that sets of any size take a moment; p is exact to about 1e-30.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations

import numpy as np

from patchclamp_server.artifacts.neuron_sets import Neuron, load
from patchclamp_server.artifacts.store import ArtifactStore
from patchclamp_server.errors import FailedPrecondition, InvalidArgument
from patchclamp_server.model.arrays import FloatArray
from patchclamp_server.model.info import ModelInfo

NEGLIGIBLE = 1e-40
# Every two sets are compared.
MAX_NEURON_SETS = 64


@dataclass(frozen=True)
class NeuronSetOverlap:
    """`first` and `second` are places in the request; `by_layer` counts the neurons in common."""

    first: int
    second: int
    jaccard: float
    overlap_coefficient: float
    common: int
    expected_common: float
    p_value: float
    by_layer: dict[int, int]


def compare(refs: Sequence[str], top_k: int, store: ArtifactStore, info: ModelInfo) -> list[NeuronSetOverlap]:
    """Returns the overlap of every two sets, of their `top_k` best neurons where it is not 0.

    Raises NotFound or InvalidArgument (path of the set), and FailedPrecondition for a set of another model than the
    served one, or one without scores where the best are asked for.
    """
    if not 2 <= len(refs) <= MAX_NEURON_SETS:
        raise InvalidArgument("neuron_sets", f"expected 2 to {MAX_NEURON_SETS} sets, got {len(refs)}")
    sets: list[frozenset[Neuron]] = []
    for i, ref in enumerate(refs):
        artifact, found = load(ref, store, f"neuron_sets[{i}]")
        if artifact.info.model_fingerprint != info.fingerprint:
            made_for = artifact.info.model_fingerprint
            raise FailedPrecondition(
                f"neuron_sets[{i}]", f"{ref} was made for model {made_for}, served is {info.fingerprint}"
            )
        if top_k and found.scores is None:
            raise FailedPrecondition("top_k", f"{ref} has no scores; leave top_k out")
        sets.append(frozenset(found.first(top_k).neurons if top_k else found.neurons))
    return [_overlap(i, j, sets[i], sets[j], info.d_ff) for i, j in combinations(range(len(sets)), 2)]


def _overlap(i: int, j: int, a: frozenset[Neuron], b: frozenset[Neuron], d_ff: int) -> NeuronSetOverlap:
    common = a & b
    layers_a, layers_b = Counter(n.layer for n in a), Counter(n.layer for n in b)
    shared = [(layers_a[layer], layers_b[layer]) for layer in sorted(layers_a.keys() & layers_b.keys())]
    return NeuronSetOverlap(
        first=i,
        second=j,
        jaccard=len(common) / len(a | b),
        overlap_coefficient=len(common) / min(len(a), len(b)),
        common=len(common),
        expected_common=sum(x * y / d_ff for x, y in shared),
        p_value=chance_of(len(common), shared, d_ff),
        by_layer=dict(sorted(Counter(n.layer for n in common).items())),
    )


def chance_of(common: int, shared: list[tuple[int, int]], d_ff: int) -> float:
    """Returns P(X ≥ common) for the sum X of one draw a layer: (a_l, b_l) of `shared`, as above."""
    from scipy.stats import hypergeom

    if not common:
        return 1.0
    start, distribution = 0, np.ones(1)
    for x, y in shared:
        first, layer = _without_tails(hypergeom.pmf(np.arange(min(x, y) + 1), d_ff, x, y))
        second, distribution = _without_tails(np.convolve(distribution, layer))
        start += first + second
    return float(min(1.0, distribution[max(0, common - start) :].sum()))


def _without_tails(probabilities: FloatArray) -> tuple[int, FloatArray]:
    """Returns where the probabilities that are not negligible begin, and all up to the last of them."""
    kept = np.flatnonzero(probabilities >= NEGLIGIBLE)
    return int(kept[0]), probabilities[kept[0] : kept[-1] + 1]
