"""Online code: how short labels become to someone who sees the activations and learns as the texts come.

    L = n_1 log2 K + Σ_i Σ_{t in (n_i, n_{i+1}]} -log2 p_i(y_t | x_t)       p_i fitted to the first n_i texts
    ratio = L / (n log2 K)

Texts come by documents, all windows of one together: the label of a window is no news after that of another. n_i are
the texts of a number of documents that doubles up to all. 1 means that nothing was learnt that holds for the next
texts, as with random labels; what a probe learns late, from many texts, costs more than what it learns from few.
Source: Voita & Titov 2020, Information-Theoretic Probing with Minimum Description Length, §3.2.
"""

from itertools import pairwise

import numpy as np

from patchclamp_server.analysis.probes.fitting import Examples
from patchclamp_server.analysis.probes.method import Doubles, Method

LEAST_DOCUMENTS = 8


def code_length_ratio(method: Method, z: Doubles, examples: Examples, strength: float, seed: int) -> float:
    """Returns the ratio for inputs z [n, k] of documents in a random order, at the strength of the probe. The first
    documents, until each class has come, are sent by the uniform code."""
    _, first_text, document = np.unique(examples.documents, return_index=True, return_inverse=True)
    n_documents, n_classes = len(first_text), examples.n_classes
    order = np.random.default_rng(seed).permutation(n_documents)
    turn = np.empty(n_documents, dtype=np.int64)
    turn[order] = np.arange(n_documents)
    # Of each text that of its document.
    texts = np.argsort(turn[document], kind="stable")
    x, y = z[texts], examples.y[texts]
    labels = examples.y[first_text][order]
    all_came = 1 + max(int(np.flatnonzero(labels == k)[0]) for k in range(n_classes))
    first = max(all_came, LEAST_DOCUMENTS)
    ends = [n_documents]
    while ends[-1] // 2 >= first:
        ends.append(ends[-1] // 2)
    ends.reverse()
    n_texts = np.searchsorted(turn[document][texts], ends).tolist()
    total = n_texts[0] * np.log(n_classes)
    for start, end in pairwise(n_texts):
        fit = method.fit(x[:start], y[:start], n_classes, strength)
        total += method.loss(fit.scores(x[start:end]), y[start:end]).sum()
    return float(total / (len(y) * np.log(n_classes)))
