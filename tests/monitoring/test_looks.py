"""What is copied and projected at a place, against float64, by loops and by operators."""

import numpy as np
import pytest
import torch
from torch import Tensor

from patchclamp_server.monitoring.looks import LOGISTIC, Gathered, Projected, looks_at
from patchclamp_server.monitoring.ring import Ring, Row, Rows

WIDTH, STEP = 24, 40
CPU = torch.device("cpu")


def normal(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


PLACES = [
    Gathered(np.array([3, 0, 23, 3]), WIDTH),
    Projected(normal(5, WIDTH, seed=1), normal(5, seed=2), torch.tensor([torch.nan, 0.0, 2.0, LOGISTIC, torch.nan])),
    Gathered(np.array([7]), 2 * WIDTH, has_norm=False),
    Projected(normal(2, WIDTH, seed=3), torch.zeros(2), torch.full((2,), torch.nan)),
]
# As a model leaves them: rows of every other memory, and numbers that the loops do not read.
X = {
    "contiguous": lambda x: x,
    "strided": lambda x: x.t().contiguous().t(),
    "bfloat16": lambda x: x.bfloat16(),
}


def expected(x: Tensor) -> Tensor:
    wide = x.double()
    columns, norms = [], []
    for place in PLACES:
        if isinstance(place, Gathered):
            columns.append(wide[:, place.units])
        else:
            p = wide[:, : place.width] @ place.vectors.double().t() + place.bias.double()
            columns.append(torch.where(place.cut == LOGISTIC, p.sigmoid(), torch.where(p <= place.cut, 0.0, p)))
        if place.has_norm:
            norms.append(wide[:, : place.width].norm(dim=1, keepdim=True))
    return torch.cat(columns + norms, dim=1)


@pytest.mark.parametrize("layout", X)
@pytest.mark.parametrize("compiled", [True, False])
def test_values_of_rows_and_norms_are_left_in_their_columns_and_nowhere_else(compiled: bool, layout: str) -> None:
    """Few rows and many, one step after another, the last of more rows than a ring has."""
    ring = Ring(sum(map(len, PLACES)) + 3, CPU, compiled=compiled)
    looks = looks_at(PLACES, ring)
    for seed, n in enumerate([1, 2, 8, 9, 30, 2 * ring.capacity]):
        x = normal(n + STEP, 2 * WIDTH, seed=seed)
        index = np.random.default_rng(seed).permutation(len(x))[:n]
        if not ring.has_room(n):
            ring.take()
            ring.empty(n)
        ring.values[len(ring.kept) :] = torch.nan
        looks.begin(Rows(index, [Row(0, 0, 0, True, 1, 0.0)] * n))
        values = torch.as_tensor(ring.values)
        before = values.clone()
        for number, place in enumerate(PLACES):
            looks.look(number, X[layout](x[:, : place.width].contiguous()))
        want = expected(X[layout](x))[torch.from_numpy(index)]
        torch.testing.assert_close(values[ring.at : ring.at + n].double(), want, rtol=1e-5, atol=1e-5)
        assert torch.equal(values[: ring.at], before[: ring.at])
        assert values[ring.at + n :].isnan().all()
        ring.commit(ring.step)


def test_a_row_that_is_not_finite_cuts_nothing() -> None:
    for compiled in (True, False):
        ring = Ring(3, CPU, compiled=compiled)
        looks = looks_at([Projected(torch.ones(2, 3), torch.zeros(2), torch.tensor([0.0, torch.nan]))], ring)
        for value in (torch.nan, torch.inf):
            looks.begin(Rows(np.array([0]), [Row(0, 0, 0, True, 1, 0.0)]))
            looks.look(0, torch.tensor([[1.0, value, 1.0]]))
            assert not torch.as_tensor(ring.values)[0].isfinite().any()


def test_a_probability_far_from_a_half_is_0_or_1() -> None:
    for compiled in (True, False):
        ring = Ring(3, CPU, compiled=compiled)
        looks = looks_at([Projected(torch.tensor([[1.0], [-1.0]]), torch.zeros(2), torch.full((2,), LOGISTIC))], ring)
        looks.begin(Rows(np.array([0]), [Row(0, 0, 0, True, 1, 0.0)]))
        looks.look(0, torch.tensor([[2000.0]]))
        assert torch.as_tensor(ring.values)[0, :2].tolist() == [1.0, 0.0]
