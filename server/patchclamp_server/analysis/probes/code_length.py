"""Online code: how short labels become to someone who sees the activations and learns as the texts come.

    L = n_1 log2 K + Σ_i Σ_{t in (n_i, n_{i+1}]} -log2 p_i(y_t | x_t)       p_i fitted to the first n_i texts
    ratio = L / (n log2 K)

n_i doubles up to n. 1 means that nothing was learnt that holds for the next texts, as with random labels; what a probe
learns late, from many texts, costs more than what it learns from few. No document is cut: its windows are sent
together, since one would tell the label of the others. Source: Voita & Titov 2020, Information-Theoretic
Probing with Minimum Description Length, §3.2.
"""

from itertools import pairwise

import numpy as np

from patchclamp_server.analysis.probes.fitting import Examples
from patchclamp_server.analysis.probes.method import Doubles, Method

LEAST_TEXTS = 8


def code_length_ratio(method: Method, z: Doubles, examples: Examples, strength: float, seed: int) -> float:
    """Returns the ratio for inputs z [n, k], their documents in a random order, at the strength of the probe. The first
    texts, until each class has come, are sent by the uniform code."""
    documents, of = np.unique(examples.documents, return_inverse=True)
    place = np.empty(len(documents), dtype=np.int64)
    place[np.random.default_rng(seed).permutation(len(documents))] = np.arange(len(documents))
    order = np.argsort(place[of], kind="stable")
    x, y, n_classes = z[order], examples.y[order], examples.n_classes
    all_came = 1 + max(int(np.flatnonzero(y == k)[0]) for k in range(n_classes))
    n = len(y)
    first = max(all_came, LEAST_TEXTS)
    begins = np.append(0, 1 + np.flatnonzero(np.diff(of[order])))
    ends = [n]
    while (half := int(begins[begins <= ends[-1] // 2][-1])) >= first:
        ends.append(half)
    ends.reverse()
    total = ends[0] * np.log(n_classes)
    for start, end in pairwise(ends):
        fit = method.fit(x[:start], y[:start], n_classes, strength)
        total += method.loss(fit.scores(x[start:end]), y[start:end]).sum()
    return float(total / (n * np.log(n_classes)))
