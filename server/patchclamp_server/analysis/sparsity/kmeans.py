"""Finds clusters by k-means, with their number at the elbow of the inertia."""

import numpy as np
import torch
from torch import Tensor

LEAST, MOST = 4, 12


def elbow_clusters(points: Tensor, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Returns centres [k, width] and the cluster of each point [n]; 4 ≤ k ≤ 12, or less where there are fewer points.

    The elbow is the k whose inertia is farthest below the straight line from the least to the most clusters.
    """
    from sklearn.cluster import KMeans

    data = points.float().cpu().numpy()
    distinct = len(np.unique(data, axis=0))
    sizes = range(min(LEAST, distinct), min(MOST, distinct) + 1)
    fits = [KMeans(k, n_init=4, random_state=seed).fit(data) for k in sizes]
    inertia = np.array([fit.inertia_ for fit in fits])
    line = np.linspace(inertia[0], inertia[-1], len(fits))
    best = fits[int((line - inertia).argmax())]
    centres = torch.from_numpy(best.cluster_centers_).float().to(points.device)
    return centres, torch.from_numpy(best.labels_).long().to(points.device)
