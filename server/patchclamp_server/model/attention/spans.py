"""The rows of a ragged batch come from spans of consecutive tokens of sequences, which are single objects or arrays."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from patchclamp_server.model.arrays import IntArray


@dataclass(frozen=True, eq=False)
class Span:
    """Rows [start, start + n) of the batch are consecutive tokens of one sequence, the first at position `offset`."""

    start: int
    n: int
    offset: int
    blocks: list[int]


@dataclass(frozen=True, eq=False)
class Spans:
    """Holds the spans of a step as arrays; spans of one row come first.

    Span i has `n` [S] rows, which follow those of span i - 1 and are tokens from position `offsets` [S] on; `tables`
    [S, blocks] has its blocks, at least as many as those tokens and the ones before them fill.
    """

    n: IntArray
    offsets: IntArray
    tables: IntArray

    @classmethod
    def of(cls, spans: Sequence[Span], block_size: int) -> "Spans":
        n = np.array([s.n for s in spans], dtype=np.int64)
        offsets = np.array([s.offset for s in spans], dtype=np.int64)
        used = (offsets + n - 1) // block_size + 1
        tables = np.zeros((len(spans), used.max(initial=0)), dtype=np.int64)
        for table, span, blocks in zip(tables, spans, used.tolist(), strict=True):
            table[:blocks] = span.blocks[:blocks]
        return cls(n, offsets, tables)

    def __len__(self) -> int:
        return len(self.n)

    @cached_property
    def starts(self) -> IntArray:
        """The first row of each span, [S]."""
        starts: IntArray = np.cumsum(self.n) - self.n
        return starts

    @cached_property
    def n_single(self) -> int:
        """The number of spans of one row. Raises ValueError where they are not the first ones."""
        single = self.n == 1
        found = int(single.sum())
        if not single[:found].all():
            raise ValueError("single-token spans must be the first rows of the batch")
        return found

    @cached_property
    def span_of(self) -> IntArray:
        """The span of each row, [T]."""
        return np.repeat(np.arange(len(self.n)), self.n)

    @cached_property
    def positions(self) -> IntArray:
        """The positions of all rows, [T]."""
        if self.n_single == len(self.n):
            return self.offsets
        positions: IntArray = np.arange(len(self.span_of)) + (self.offsets - self.starts)[self.span_of]
        return positions

    def slots(self, block_size: int) -> IntArray:
        """Returns the token addresses block * block_size + offset in the KV pool, [T]."""
        slots: IntArray = self.tables[self.span_of, self.positions // block_size] * block_size
        return slots + self.positions % block_size

    def as_lists(self) -> list[tuple[int, int, list[int]]]:
        """Returns the number of rows, the position of the first row and the blocks of each span."""
        return list(zip(self.n.tolist(), self.offsets.tolist(), self.tables.tolist(), strict=True))
