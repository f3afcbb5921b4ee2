"""Block tables kept from step to step, against tables that are made anew."""

import numpy as np

from patchclamp_server.engine.block_tables import BlockTables
from patchclamp_server.model.attention.spans import Span, Spans

BLOCK = 4


def padded(lists: list[list[int]]) -> list[list[int]]:
    most = max(map(len, lists), default=0)
    return [blocks + [0] * (most - len(blocks)) for blocks in lists]


def test_rows_follow_lists_that_grow_come_go_and_change_places() -> None:
    tables = BlockTables()
    random = np.random.default_rng(0)
    lists: list[list[int]] = []
    for step in range(200):
        for blocks in lists:
            if random.random() < 0.3:
                blocks.append(int(random.integers(1, 1000)))
        if lists and random.random() < 0.2:
            lists.pop(int(random.integers(len(lists))))
        if random.random() < 0.3:
            lists.insert(int(random.integers(len(lists) + 1)), random.integers(1, 1000, step % 5).tolist())
        if random.random() < 0.2:
            random.shuffle(lists)  # type: ignore[arg-type]
        assert tables.of(list(lists)).tolist() == padded(lists)


def test_a_list_of_the_same_length_that_takes_the_place_of_another_is_written_anew() -> None:
    tables = BlockTables()
    assert tables.of([[1, 2], [3, 4]]).tolist() == [[1, 2], [3, 4]]
    assert tables.of([[1, 2], [5, 6]]).tolist() == [[1, 2], [5, 6]]


def test_an_array_that_was_given_out_does_not_change_with_the_next_step() -> None:
    tables, blocks = BlockTables(), [7]
    first = tables.of([blocks])
    blocks.append(8)
    tables.of([blocks])
    assert first.tolist() == [[7]]


def test_positions_and_slots_of_spans_are_those_of_each_row() -> None:
    spans = [Span(0, 1, 5, [9, 2]), Span(1, 1, 0, [4]), Span(2, 5, 2, [7, 3]), Span(7, 3, 9, [1, 5, 6])]
    rows = [(s, position) for s in spans for position in range(s.offset, s.offset + s.n)]
    arrays = Spans.of(spans, BLOCK)
    assert arrays.starts.tolist() == [s.start for s in spans]
    assert arrays.positions.tolist() == [position for _, position in rows]
    assert arrays.slots(BLOCK).tolist() == [s.blocks[p // BLOCK] * BLOCK + p % BLOCK for s, p in rows]
