"""In a step the watches choose the rows that they want, and count later what these left in the ring."""

from collections.abc import Sequence
from time import monotonic
from typing import NamedTuple

import numpy as np

from patchclamp_server.monitoring.layout import Layout
from patchclamp_server.monitoring.ring import Row, Rows
from patchclamp_server.monitoring.running import Call, Running

# The bits of an int64 tell who watches a row.
MAX_WATCHES = 63


class ServedSpan(NamedTuple):
    """The n rows of a step from `row` on are tokens of one sequence from `position` on; those before `fresh` have been
    computed before."""

    row: int
    position: int
    token_ids: Sequence[int]
    sequence: int
    prompt_length: int
    fresh: int


class StepWatch(NamedTuple):
    """Holds what a step does for the watches: its rows, and the places that look at them."""

    layout: Layout
    rows: Rows
    # These tell to whom each row of the ring belongs, while the layout is in use.
    watches: Sequence[Running]


def counted(layout: Layout, watches: Sequence[Running]) -> list[Call]:
    """Counts what is in the ring; returns the calls that tell others."""
    ring, calls = layout.ring, list[Call]()
    taken = ring.take()
    if taken:
        bits = np.array([ring.kept[row].watches for row in taken])
        for number, running in enumerate(watches):
            rows = taken.start + np.flatnonzero(bits & (1 << number))
            calls += running.take(ring, rows, layout.columns[number])
    return calls


def awaited(layout: Layout, watches: Sequence[Running]) -> bool:
    """Returns whether somebody is told more as soon as the ring is counted."""
    for running in watches:
        if running.follows:
            return True
        soon = running.soon
        if soon is not None and soon <= layout.ring.pending:
            return True
    return False


def watched_rows(spans: Sequence[ServedSpan], watches: Sequence[Running]) -> Rows | None:
    """Returns the rows that are computed for the first time and that somebody watches. The first token of a sequence is
    where heads with nothing to do look, and has a norm of its own (the attention sink): it would be an outlier in every
    figure, so it is only counted.

    This is plain Python because numpy's calls cost more than they do for one row.
    """
    index: list[int] = []
    kept: list[Row] = []
    now = monotonic()
    for span in spans:
        for i in range(max(0, span.fresh - span.position), len(span.token_ids)):
            position = span.position + i
            generated = position >= span.prompt_length
            if not position:
                for running in watches:
                    running.sinks += running.wants(generated)
                continue
            bits = 0
            for number, running in enumerate(watches):
                if running.wants(generated):
                    bits |= 1 << number
            if bits:
                index.append(span.row + i)
                kept.append(Row(span.token_ids[i], position, span.sequence, generated, bits, now))
    return Rows(np.array(index, dtype=np.int64), kept) if kept else None
