"""The nearest of N concepts."""

import numpy as np
import torch
from sklearn.neighbors import NearestNeighbors

from patchclamp_server.analysis.steering.definition import nearest_accuracy


def states(n: int, noise: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Definitions and words [n, 12] of the same concepts, each set around an offset of its own."""
    generator = torch.Generator().manual_seed(0)
    concepts = torch.randn(n, 12, generator=generator)
    own, other = noise * torch.randn(2, n, 12, generator=generator)
    return concepts + own + 30 * torch.randn(12, generator=generator), concepts + other - 7


def test_concepts_are_found_whatever_their_sets_have_in_common() -> None:
    assert nearest_accuracy(*states(40, 0.1)) == 1.0


def test_the_share_is_that_of_the_nearest_neighbours_of_centred_states() -> None:
    definitions, words = states(60, 1.0)
    a, b = (x.double().numpy() - x.double().numpy().mean(0) for x in (definitions, words))
    nearest = NearestNeighbors(n_neighbors=1, metric="cosine", algorithm="brute").fit(b).kneighbors(a)[1][:, 0]
    share = float(np.mean(nearest == np.arange(60)))
    assert 0.1 < share < 0.9
    assert nearest_accuracy(definitions, words) == share
