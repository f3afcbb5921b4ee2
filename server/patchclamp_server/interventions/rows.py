"""The rows of some spans as the tables know them: their slots, and masks of the items in scope."""

from dataclasses import dataclass

import numpy as np

from patchclamp_server.interventions.columns import FLAGS, ITEM, KIND, EntryFlag, EntryKind
from patchclamp_server.interventions.layout import WORD, ProgramLayout
from patchclamp_server.interventions.spans import ProgramSpan
from patchclamp_server.interventions.state import ProgramState
from patchclamp_server.interventions.tables import HostTables, Tables
from patchclamp_server.model.arrays import BoolArray, IntArray


@dataclass(eq=False)
class SpanRows:
    """The R rows of S spans that have programs, one span after the other."""

    states: list[ProgramState]
    owner: IntArray  # [R] which span
    offset: IntArray  # [R] place in its span
    row: IntArray  # [R] of the batch
    slot: IntArray  # [R]
    mask: IntArray  # [R, words]
    counted: BoolArray  # [R]

    @property
    def layouts(self) -> list[ProgramLayout]:
        return [state.loaded.layout for state in self.states]

    def inside(self, rows: IntArray, item: IntArray) -> BoolArray:
        """Whether each row is in the scope of its item, pair by pair."""
        words = self.mask[rows, item // WORD]
        found: BoolArray = (words >> (item % WORD)) & 1 != 0
        return found


def steady_rows(tables: Tables, spans: list[ProgramSpan]) -> SpanRows:
    """Returns the rows of spans of one generated token with settled scopes: they are the same from step to step."""
    states = [span.state for span in spans if span.state is not None]
    slots = [state.slots(tables, span.positions) for span, state in zip(spans, states, strict=True)]
    n = len(spans)
    return SpanRows(
        states,
        np.arange(n),
        np.zeros(n, dtype=np.int64),
        np.array([span.row for span in spans], dtype=np.int64),
        np.concatenate(slots),
        _stacked([state.settled_masks for state in states]),
        np.ones(n, dtype=np.bool_),
    )


def moving_rows(tables: Tables, spans: list[ProgramSpan]) -> SpanRows:
    """Returns the rows of any spans that have programs."""
    states, slots, masks, counted = [], [np.empty(0, dtype=np.int64)], [], [np.empty(0, dtype=np.bool_)]
    for span in spans:
        state, positions = span.state, span.positions
        assert state is not None
        states.append(state)
        slots.append(state.slots(tables, positions))
        masks.append(state.loaded.layout.masks(state.sequence, positions, span.token_ids))
        counted.append(positions >= state.counted)
    lengths = np.array([len(span.token_ids) for span in spans], dtype=np.int64)
    owner = np.repeat(np.arange(len(spans)), lengths)
    starts = np.cumsum(lengths) - lengths
    offset = np.arange(len(owner)) - starts[owner]
    row = np.array([span.row for span in spans], dtype=np.int64)[owner] + offset
    return SpanRows(states, owner, offset, row, np.concatenate(slots), _stacked(masks), np.concatenate(counted))


def _stacked(masks: list[IntArray]) -> IntArray:
    """Stacks masks one below the other, as wide as the widest."""
    words = max((own.shape[1] for own in masks), default=1)
    stacked = np.zeros((sum(len(own) for own in masks), words), dtype=np.int64)
    at = 0
    for own in masks:
        stacked[at : at + len(own), : own.shape[1]] = own
        at += len(own)
    return stacked


def chosen(host: HostTables, rows: SpanRows, *, behind: bool) -> tuple[IntArray, IntArray, BoolArray]:
    """Returns pairs of a row and an entry that runs there, row by row, and whether the row is in the entry's scope.

    A latched condition runs outside its scope too, since gates ask it there. With `behind`, only entries that kernels
    do not run are returned.
    """
    extents = host.extents[rows.slot]
    first, end = extents[:, 1 if behind else 0], extents[:, 2]
    n = end - first
    local = np.repeat(np.arange(len(n)), n)
    entry = np.arange(len(local)) + np.repeat(first - (np.cumsum(n) - n), n)
    ints = host.ints[entry]
    kind = ints[:, KIND]
    inside = rows.inside(local, ints[:, ITEM])
    # Rows computed again after a preemption are edited again, with what edits take from them, but not read again.
    inside &= (kind <= EntryKind.CONDITION) | (ints[:, FLAGS] & EntryFlag.INPUT != 0) | rows.counted[local]
    latched = (kind == EntryKind.CONDITION) & (ints[:, FLAGS] & EntryFlag.LATCHED != 0)
    kept = inside | latched
    return local[kept], entry[kept], inside[kept]
