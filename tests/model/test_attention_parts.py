"""The parts of a step's attention have every chunk of keys of every tile and KV head once, whatever the step."""

import numpy as np
import pytest

from patchclamp_server.model.arrays import IntArray
from patchclamp_server.model.attention.parts import (
    CHUNK,
    COUNTER,
    FIRST_CHUNK,
    FIRST_KV,
    LAST_CHUNK,
    LAST_KV,
    OF,
    RECORDS,
    TILE,
    Parts,
    parts_of,
)

# Rows of each tile, and the position of the first.
STEPS = {
    "nothing": [],
    "one short": [(1, 5)],
    "one long": [(1, 8000)],
    "unequal": [(1, 8000), (1, 3), (1, 600), (16, 496), (16, 1040), (5, 0)],
    "batch": [(1, 500)] * 16,
    "prompt": [(16, 16 * i) for i in range(32)],
}


def parts(step: str, n_kv: int, threads: int) -> tuple[Parts, IntArray]:
    tiles = np.array([(i, 0, rows, at) for i, (rows, at) in enumerate(STEPS[step])], dtype=np.int64).reshape(-1, 4)
    return parts_of(tiles, n_kv, threads), tiles


@pytest.mark.parametrize("step", STEPS)
@pytest.mark.parametrize("n_kv", [1, 3])
@pytest.mark.parametrize("threads", [1, 2, 16])
def test_every_chunk_is_in_one_part(step: str, n_kv: int, threads: int) -> None:
    found, tiles = parts(step, n_kv, threads)
    seen = [
        (part[TILE], kv, chunk)
        for part in found.items
        for kv in range(part[FIRST_KV], part[LAST_KV])
        for chunk in range(part[FIRST_CHUNK], part[LAST_CHUNK])
    ]
    ends = tiles[:, 2] + tiles[:, 3]
    expected = [(t, kv, c) for t, end in enumerate(ends) for kv in range(n_kv) for c in range(-(-end // CHUNK))]
    assert sorted(seen) == expected


@pytest.mark.parametrize("step", STEPS)
@pytest.mark.parametrize("threads", [2, 16])
def test_parts_of_one_tile_and_head_share_a_counter_and_records_of_their_own(step: str, threads: int) -> None:
    found, tiles = parts(step, 3, threads)
    shared = found.items[found.items[:, COUNTER] >= 0]
    counted = np.bincount(shared[:, COUNTER], minlength=found.n_counters)
    ends = []
    for counter in range(found.n_counters):
        own = shared[shared[:, COUNTER] == counter]
        assert len({(part[TILE], part[FIRST_KV], part[RECORDS]) for part in own}) == 1
        assert (own[:, OF] == counted[counter]).all()
        tile = tiles[own[0, TILE]]
        ends.append((own[0, RECORDS], own[0, RECORDS] + tile[2] * -(-(tile[2] + tile[3]) // CHUNK)))
    assert [first for first, _ in ends] == [0, *(last for _, last in ends)][: len(ends)]
    assert found.n_records == (ends[-1][1] if ends else 0)


def test_a_long_row_is_dealt_to_all_threads_and_a_short_one_is_not() -> None:
    assert len(parts("one long", 3, 2)[0].items) >= 8
    assert len(parts("one long", 1, 16)[0].items) >= 16
    assert len(parts("one short", 3, 16)[0].items) == 1
    assert len(parts("one long", 3, 1)[0].items) <= 3
