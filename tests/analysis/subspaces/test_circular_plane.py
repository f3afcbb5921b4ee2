"""The plane of a cycle: what its correlation is, and that it is found among other components."""

import math
from itertools import combinations

import pytest
import torch
from torch import Tensor

from patchclamp_server.analysis.subspaces.circular_plane import circular_correlation, circular_plane

VALUES, WIDTH = 7, 24


def planted(*, backwards: bool = False, noise: float = 0.05) -> tuple[Tensor, Tensor, Tensor]:
    """Means of values in a circle beside a component of larger variance, with the axes and the centre."""
    generator = torch.Generator().manual_seed(3)
    basis = torch.linalg.qr(torch.randn(WIDTH, 3, generator=generator, dtype=torch.float64))[0].T
    angles = 2 * math.pi * torch.arange(VALUES, dtype=torch.float64) / VALUES * (-1 if backwards else 1) + 0.4
    circle = torch.stack((angles.cos(), angles.sin()), 1) @ basis[:2]
    # Uncorrelated with the circle over the values, so that it is a principal component of its own.
    larger = 4 * (2 * angles).cos()[:, None] * basis[2]
    centre = torch.randn(WIDTH, generator=generator, dtype=torch.float64)
    scatter = noise * torch.randn(VALUES, WIDTH, generator=generator, dtype=torch.float64)
    return circle + larger + centre + scatter, basis[:2], centre


def naive_correlation(angles: list[float]) -> float:
    n = len(angles)
    cycle = [2 * math.pi * v / n for v in range(n)]
    pairs = list(combinations(range(n), 2))
    both = sum(math.sin(angles[u] - angles[v]) * math.sin(cycle[u] - cycle[v]) for u, v in pairs)
    own = sum(math.sin(angles[u] - angles[v]) ** 2 for u, v in pairs)
    of_cycle = sum(math.sin(cycle[u] - cycle[v]) ** 2 for u, v in pairs)
    return both / math.sqrt(own * of_cycle)


def test_the_correlation_is_that_of_fisher_and_lee() -> None:
    angles = torch.rand(4, VALUES, dtype=torch.float64) * 2 * math.pi
    expected = [naive_correlation(row.tolist()) for row in angles]
    assert circular_correlation(angles).tolist() == pytest.approx(expected)


def test_angles_of_the_cycle_correlate_fully_from_wherever_they_begin() -> None:
    cycle = 2 * math.pi * torch.arange(VALUES, dtype=torch.float64) / VALUES
    assert float(circular_correlation(cycle + 1.1)) == pytest.approx(1)
    assert float(circular_correlation(2.0 - cycle)) == pytest.approx(-1)
    assert float(circular_correlation(torch.zeros(VALUES, dtype=torch.float64))) == 0


@pytest.mark.parametrize("backwards", [False, True])
def test_a_planted_circle_is_found_beside_a_larger_component(backwards: bool) -> None:
    means, basis, _ = planted(backwards=backwards)
    plane = circular_plane(means, 5, seed=0)
    assert plane is not None
    cosines = torch.linalg.svdvals(plane.axes.double() @ basis.T)
    assert float(cosines.min()) > 0.98
    assert plane.circularity > 0.99
    assert plane.shuffled_circularity < plane.circularity - 0.1
    torch.testing.assert_close(plane.centre.double(), means.mean(0), rtol=1e-6, atol=1e-6)
    away = means - means.mean(0)
    share = (away @ plane.axes.double().T).square().sum() / away.square().sum()
    assert plane.explained_variance == pytest.approx(float(share), rel=1e-5)


@pytest.mark.parametrize("backwards", [False, True])
def test_a_rotation_by_k_steps_leads_each_value_k_on(backwards: bool) -> None:
    means, _, _ = planted(backwards=backwards, noise=0.0)
    plane = circular_plane(means, 5, seed=0)
    assert plane is not None
    axes = plane.axes.double()
    for k in range(VALUES):
        angle = 2 * math.pi * k / VALUES
        turn = torch.tensor([[math.cos(angle), -math.sin(angle)], [math.sin(angle), math.cos(angle)]]).double()
        inside = (means - plane.centre.double()) @ axes.T @ turn.T
        expected = (means.roll(-k, 0) - plane.centre.double()) @ axes.T
        assert float((inside - expected).abs().max()) < 1e-5


@pytest.mark.parametrize("backwards", [False, True])
def test_the_angles_are_those_of_the_means_in_the_plane(backwards: bool) -> None:
    means, _, _ = planted(backwards=backwards)
    plane = circular_plane(means, 5, seed=0)
    assert plane is not None
    inside = (means - plane.centre.double()) @ plane.axes.double().T
    expected = [math.atan2(y, x) for x, y in inside.tolist()]
    assert plane.angles == pytest.approx(expected, abs=1e-5)


def test_values_at_one_point_or_on_a_line_span_no_plane() -> None:
    assert circular_plane(torch.ones(VALUES, WIDTH), 5, seed=0) is None
    line = torch.arange(VALUES, dtype=torch.float64)[:, None] * torch.ones(WIDTH, dtype=torch.float64)
    assert circular_plane(line, 5, seed=0) is None
