"""Reducers for single neurons: chosen units, the largest of each text, all rows of one text."""

import numpy as np
import pytest
import torch
from torch import Tensor

from patchclamp_server.engine.reducers.chosen_units import ChosenUnits
from patchclamp_server.engine.reducers.kept_rows import KeptRows
from patchclamp_server.engine.reducers.largest_of_texts import LargestOfTexts
from patchclamp_server.engine.reducers.reducer import Place, Reducer, Rows
from patchclamp_server.engine.reducers.top_k import NOWHERE

WIDTH = 6
LENGTHS = (5, 9, 2, 7)


def texts() -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    # Few different values, so that there are equal ones.
    return [torch.randint(-4, 5, (n, WIDTH), generator=generator).float() for n in LENGTHS]


def give(reducer: Reducer, number: int, rows: Tensor, chunk: int) -> None:
    given = Rows(reducer, number, ids=np.zeros(len(rows), dtype=np.int64))
    for start in range(0, len(rows), chunk):
        given.add(0, rows[start : start + chunk], start)


@pytest.mark.parametrize("order", [(0, 1, 2, 3), (2, 3, 0, 1)])
@pytest.mark.parametrize("chunk", [1, 4, 100])
def test_each_text_gives_its_largest_value_alone_in_whichever_order_texts_come(order: tuple[int], chunk: int) -> None:
    reducer, every = LargestOfTexts((0,), 3), texts()
    for number in order:
        give(reducer, number, every[number], chunk)
    found = reducer.largest(0)
    for unit in range(WIDTH):
        expected = sorted(
            (-float(rows[:, unit].max()), number, int(rows[:, unit].argmax())) for number, rows in enumerate(every)
        )[:3]
        assert found.values[unit].tolist() == [-value for value, _, _ in expected]
        assert found.texts[unit].tolist() == [number for _, number, _ in expected]
        assert found.positions[unit].tolist() == [position for _, _, position in expected]


def test_fewer_texts_than_asked_for_leave_places_empty() -> None:
    reducer = LargestOfTexts((0,), 3)
    give(reducer, 7, texts()[0], 2)
    assert reducer.largest(0).texts[:, 0].tolist() == [7] * WIDTH
    assert (reducer.largest(0).texts[:, 1:] == NOWHERE).all()


@pytest.mark.parametrize("chunk", [1, 3, 100])
def test_chosen_units_come_alone_and_without_the_tokens_that_are_skipped(chunk: int) -> None:
    rows, kept, largest = texts()[1], KeptRows((0,)), LargestOfTexts((0,), 1)
    give(ChosenUnits({0: torch.tensor([4, 1])}, (kept, largest), skip=2), 3, rows, chunk)
    assert torch.equal(kept.rows(0), rows[2:, [4, 1]])
    assert largest.largest(0).positions[:, 0].tolist() == [2 + int(rows[2:, unit].argmax()) for unit in (4, 1)]


def test_kept_rows_are_copies() -> None:
    reducer, rows = KeptRows((0,)), torch.zeros(2, WIDTH)
    reducer.add(0, rows, Place())
    rows += 1
    assert torch.equal(reducer.rows(0), torch.zeros(2, WIDTH))
