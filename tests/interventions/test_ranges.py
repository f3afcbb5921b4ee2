"""Runs of rows of a growing table."""

import random

from patchclamp_server.interventions.ranges import Ranges


def test_runs_that_are_held_never_overlap_and_all_rows_come_back() -> None:
    ranges, choose, held = Ranges(16), random.Random(0), {}
    for _ in range(500):
        if held and choose.random() < 0.5:
            first = choose.choice(list(held))
            ranges.release(first, held.pop(first))
        else:
            n = choose.randint(1, 9)
            first = ranges.acquire(n)
            rows = set(range(first, first + n))
            assert not any(rows & set(range(other, other + m)) for other, m in held.items())
            assert first + n <= ranges.capacity
            held[first] = n
    for first, n in held.items():
        ranges.release(first, n)
    assert ranges.acquire(ranges.capacity) == 0


def test_capacity_doubles_when_nothing_fits() -> None:
    ranges = Ranges(4)
    assert [ranges.acquire(3), ranges.acquire(3)] == [0, 3]
    assert ranges.capacity == 8


def test_a_run_larger_than_twice_the_table_fits() -> None:
    ranges = Ranges(4)
    assert ranges.acquire(33) == 0
    assert ranges.capacity == 64


def test_no_rows_take_no_room() -> None:
    ranges = Ranges(4)
    ranges.release(ranges.acquire(0), 0)
    assert ranges.acquire(4) == 0
