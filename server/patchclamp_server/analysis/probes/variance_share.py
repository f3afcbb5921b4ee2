"""Share of the variance of activations that the labels account for, over all coordinates:

    classes    Σ_k n_k |m_k - m|² / Σ_i |h_i - m|²                       between the classes, of all
    numbers    Σ_j cov(h_j, y)² / (var(y) Σ_j var(h_j))                  R² of each coordinate on y, by its variance

A probe may read a label without error off directions that hardly vary; what a similarity of whole activations sees is
this share: features scaled 10 : 1 have shares of 100 : 1, and are read equally well.
"""

import numpy as np

from patchclamp_server.analysis.probes.method import Doubles


def variance_share(states: Doubles, y: Doubles, n_classes: int) -> float:
    """Returns the share for states [n, width], as they are; 0 where nothing varies. `n_classes` 1: y are numbers."""
    centred = states - states.mean(axis=0)
    total = float(np.square(centred).sum())
    if n_classes > 1:
        own = [centred[y == k] for k in range(n_classes) if (y == k).any()]
        between = float(sum(len(each) * np.square(each.mean(axis=0)).sum() for each in own))
    else:
        numbers = y - y.mean()
        spread = float(np.square(numbers).sum())
        between = float(np.square(numbers @ centred).sum() / spread) if spread else 0.0
    return between / total if total else 0.0
