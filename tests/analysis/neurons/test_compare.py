"""The chance of the overlap of neuron sets."""

import numpy as np
import pytest
from scipy.stats import hypergeom

from patchclamp_server.analysis.neurons.compare import chance_of


@pytest.mark.parametrize("common", [0, 40, 60, 500])
def test_the_chance_of_an_overlap_is_that_of_all_layers_together(common: int) -> None:
    shared, d_ff = [(40, 300), (200, 100), (500, 500)], 1000
    exact = np.ones(1)
    for x, y in shared:
        exact = np.convolve(exact, hypergeom.pmf(np.arange(min(x, y) + 1), d_ff, x, y))
    assert chance_of(common, shared, d_ff) == pytest.approx(exact[common:].sum(), rel=1e-6, abs=1e-30)


def test_sets_of_all_neurons_of_a_large_model_are_compared_in_a_moment() -> None:
    """Without leaving tails out this took minutes."""
    assert chance_of(32 * 7168, [(7168, 14336)] * 32, 14336) == pytest.approx(1.0)
    assert chance_of(32 * 3584, [(7168, 7168)] * 32, 14336) == pytest.approx(0.5, abs=0.01)
