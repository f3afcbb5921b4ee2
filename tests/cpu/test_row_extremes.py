"""The largest and smallest numbers of rows, against a stable sort."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from patchclamp_server.cpu.row_extremes import row_extremes


@settings(max_examples=40, deadline=None)
@given(n=st.integers(1, 5), width=st.integers(1, 300), seed=st.integers(0, 1000), values=st.integers(1, 50))
def test_they_are_the_ends_of_a_stable_sort(n: int, width: int, seed: int, values: int) -> None:
    # Few different values: most numbers have equals.
    rows = torch.randint(values, (n, width), generator=torch.Generator().manual_seed(seed)).float() - values // 2
    k = 1 + seed % width
    top, top_at, bottom, bottom_at = row_extremes(rows, k)
    down, up = rows.sort(dim=1, descending=True, stable=True), rows.sort(dim=1, stable=True)
    assert torch.equal(top, down.values[:, :k])
    assert torch.equal(top_at, down.indices[:, :k])
    assert torch.equal(bottom, up.values[:, :k])
    assert torch.equal(bottom_at, up.indices[:, :k])


@pytest.mark.parametrize("value", [float("inf"), float("-inf")])
def test_a_row_of_infinities_ends(value: float) -> None:
    top, _, bottom, _ = row_extremes(torch.full((1, 4), value), 2)
    assert top.tolist() == bottom.tolist() == [[value, value]]
