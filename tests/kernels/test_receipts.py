"""accumulate_receipts: sums of receipts by program, in float64 and always in the same order."""

from typing import Any

import pytest
import torch
from guards import guard
from torch import Tensor

from patchclamp_kernels.receipts import accumulate_receipts, accumulate_receipts_reference


def i32(values: list[list[int]]) -> Tensor:
    return torch.tensor(values, dtype=torch.int32)


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def run(counts: Tensor, receipts: Tensor, spans: Tensor, counters: Tensor) -> Tensor:
    guards = [guard(each) for each in (counts, receipts, spans, counters)]
    accumulate_receipts(*(each.tensor for each in guards))
    for each in guards:
        each.assert_margins_intact()
    for each, given in zip(guards[1:], (receipts, spans, counters), strict=True):
        torch.testing.assert_close(each.tensor, given, rtol=0, atol=0, equal_nan=True)
    return guards[0].tensor


def assert_agrees(counts: Tensor, receipts: Tensor, spans: Tensor, counters: Tensor) -> Tensor:
    want = counts.clone()
    accumulate_receipts_reference(want, receipts, spans, counters)
    got = run(counts, receipts, spans, counters)
    torch.testing.assert_close(got, want, rtol=1e-13, atol=1e-13)
    return got


def test_each_item_of_a_span_is_added_to_its_counter() -> None:
    receipts = torch.arange(12.0).view(3, 2, 2)
    counts = torch.full((4, 2), 100.0, dtype=torch.float64)
    got = assert_agrees(counts, receipts, i32([[0, 2], [2, 1]]), i32([[3, 0], [1, -1]]))
    assert got.tolist() == [[108, 110], [108, 109], [100, 100], [104, 106]]


@pytest.mark.parametrize("items", [1, 7, 8, 9, 37, 300])
def test_items_may_fill_any_part_of_the_tiles(items: int) -> None:
    receipts = randn(5, items, 2)
    counters = i32([list(range(items)), [i + items if i % 3 else -1 for i in range(items)]])
    assert_agrees(randn(2 * items, 2, seed=1).double(), receipts, i32([[0, 3], [3, 2]]), counters)


@pytest.mark.parametrize("n", [1, 63, 64, 65, 200])
def test_a_span_may_have_any_number_of_rows(n: int) -> None:
    receipts = randn(n + 2, 3, 2)
    receipts[0] = receipts[-1] = torch.nan
    assert_agrees(torch.zeros(3, 2, dtype=torch.float64), receipts, i32([[1, n]]), i32([[2, 0, 1]]))


def test_sums_lose_no_small_changes_to_float32() -> None:
    receipts = torch.tensor([2.0**30, 1.0, 1.0, 1.0]).view(4, 1, 1).expand(4, 1, 2).contiguous()
    got = run(torch.zeros(1, 2, dtype=torch.float64), receipts, i32([[0, 4]]), i32([[0]]))
    assert got.tolist() == [[2.0**30 + 3] * 2]


def test_spans_without_rows_and_items_without_counter_touch_nothing() -> None:
    counts = torch.full((2, 2), torch.nan, dtype=torch.float64)
    counts[1] = 1.0
    receipts = torch.full((2, 2, 2), torch.nan)
    receipts[0, 1] = 1.0
    # A padding span may name what it likes.
    got = run(counts, receipts, i32([[0, 1], [0, 0], [9, 0]]), i32([[-1, 1], [0, 1], [99, -1]]))
    assert got[1].tolist() == [2.0, 2.0]
    assert got[0].isnan().all()


@pytest.mark.parametrize(("spans", "items"), [(0, 3), (2, 0)])
def test_nothing_to_add_is_fine(spans: int, items: int) -> None:
    counts = torch.ones(1, 2, dtype=torch.float64)
    spans_of = torch.zeros(spans, 2, dtype=torch.int32)
    counters = torch.zeros(spans, items, dtype=torch.int32)
    assert run(counts, torch.zeros(4, items, 2), spans_of, counters).tolist() == [[1.0, 1.0]]


def test_the_same_step_gives_the_same_bits_wherever_its_rows_lie() -> None:
    receipts = randn(150, 5, 2)
    counters = i32([[4, 3, 2, 1, 0]])
    first = run(torch.zeros(5, 2, dtype=torch.float64), receipts, i32([[0, 150]]), counters)
    moved = torch.cat((randn(33, 5, 2, seed=1), receipts, randn(7, 5, 2, seed=2)))
    again = run(torch.zeros(5, 2, dtype=torch.float64), moved, i32([[33, 150]]), counters)
    assert torch.equal(first, again)


@pytest.mark.parametrize("seed", range(10))
def test_random_steps_agree_with_the_definition(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    sizes = torch.randint(0, 90, (4,), generator=generator)
    firsts = torch.cumsum(sizes, 0) - sizes
    items = int(torch.randint(1, 40, (), generator=generator))
    counters = torch.randperm(4 * items, generator=generator).view(4, items)
    counters = torch.where(torch.rand(4, items, generator=generator) < 0.3, -1, counters).int()
    receipts = randn(int(sizes.sum()), items, 2, seed=seed)
    spans = torch.stack((firsts, sizes), 1).int()
    assert_agrees(randn(4 * items, 2, seed=seed + 50).double(), receipts, spans, counters)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("counts", torch.zeros(3, 2)),
        ("receipts", torch.zeros(4, 2, 3)),
        ("spans", torch.zeros(1, 2, dtype=torch.int64)),
        ("counters", torch.zeros(1, 3, dtype=torch.int32)),
        ("counters", torch.zeros(2, 2, dtype=torch.int32)),
    ],
)
def test_an_argument_that_does_not_fit_is_refused_by_name(name: str, value: Tensor) -> None:
    arguments: dict[str, Any] = {
        "counts": torch.zeros(3, 2, dtype=torch.float64),
        "receipts": torch.zeros(4, 2, 2),
        "spans": torch.zeros(1, 2, dtype=torch.int32),
        "counters": torch.zeros(1, 2, dtype=torch.int32),
        name: value,
    }
    with pytest.raises(ValueError, match=f"^{name} "):
        accumulate_receipts(**arguments)
