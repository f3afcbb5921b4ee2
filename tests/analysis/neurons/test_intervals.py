"""Changes of metrics with bootstrap intervals, against numpy."""

import numpy as np
import pytest
import torch

from patchclamp_server.analysis.neurons.intervals import RESAMPLES, Items, change_of


def items(x: list[float], w: list[float] | None = None) -> Items:
    values = torch.tensor(x, dtype=torch.float64)
    return Items(values, torch.ones_like(values) if w is None else torch.tensor(w, dtype=torch.float64))


def identity(mean: torch.Tensor) -> torch.Tensor:
    return mean


def test_values_are_ratios_of_sums_and_random_changes_are_those_of_each_set() -> None:
    weights = [1.0, 3.0]
    found = change_of(
        items([1.0, 3.0], weights), items([2.0, 6.0], weights), [items([1.0, 5.0], weights)], torch.exp, seed=0
    )
    assert found.unedited == pytest.approx(np.exp(1.0))
    assert found.edited == pytest.approx(np.exp(2.0))
    assert found.change == pytest.approx(np.exp(2.0) - np.exp(1.0))
    assert found.random == pytest.approx((np.exp(1.5) - np.exp(1.0),))
    assert found.beyond_random == pytest.approx(np.exp(2.0) - np.exp(1.5))


def test_intervals_are_those_of_a_bootstrap_over_items() -> None:
    generator = np.random.default_rng(3)
    before, after, control = generator.normal(0, 1, 40), generator.normal(-1, 1, 40), generator.normal(-0.2, 1, 40)
    found = change_of(items(before.tolist()), items(after.tolist()), [items(control.tolist())], identity, seed=5)
    drawn = generator.integers(0, 40, (20_000, 40))
    change = (after[drawn] - before[drawn]).mean(1)
    beyond = (after[drawn] - control[drawn]).mean(1)
    # Ends of a thousand resamples move by a few hundredths of the width.
    assert (found.low, found.high) == pytest.approx(np.quantile(change, [0.025, 0.975]), abs=0.06)
    assert (found.beyond_random_low, found.beyond_random_high) == pytest.approx(
        np.quantile(beyond, [0.025, 0.975]), abs=0.06
    )
    assert RESAMPLES == 1000


def test_what_all_items_have_in_common_has_no_width() -> None:
    spread = [0.0, 5.0, 9.0, -3.0]
    found = change_of(items(spread), items([x - 1 for x in spread]), [items(spread)], identity, seed=0)
    assert found.low == pytest.approx(-1.0)
    assert found.high == pytest.approx(-1.0)
    assert (found.beyond_random_low, found.beyond_random_high) == pytest.approx((-1.0, -1.0))
    assert found.random_deviation == 0.0


def test_the_mean_and_deviation_of_random_sets_are_over_the_sets() -> None:
    found = change_of(items([0.0]), items([3.0]), [items([1.0]), items([2.0])], identity, seed=0)
    assert found.random == (1.0, 2.0)
    assert found.random_mean == 1.5
    assert found.random_deviation == 0.5
    assert found.beyond_random == 1.5
