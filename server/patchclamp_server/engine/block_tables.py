"""The block tables of the sequences of a step as rows of one array, kept for the next step."""

from operator import is_

import numpy as np

from patchclamp_server.model.arrays import IntArray


class BlockTables:
    """Keeps the rows of the step before. A sequence's list of blocks only grows, and is another list once blocks have
    been given back (see Sequence), so a row that was there before needs only what has been appended since."""

    def __init__(self) -> None:
        self._lists: list[list[int]] = []
        # This is the number of blocks of each list that are in its row of the table.
        self._written: list[int] = []
        self._table = np.zeros((0, 0), dtype=np.int64)

    def of(self, lists: list[list[int]]) -> IntArray:
        """Returns the blocks of each list [n, most blocks], padded with block 0."""
        lengths = [*map(len, lists)]
        most = max(lengths, default=0)
        same = len(lists) == len(self._lists) and all(map(is_, lists, self._lists))
        if not same or most > self._table.shape[1]:
            self._arrange(lists, most)
        if lengths != self._written:
            for row, (blocks, written) in enumerate(zip(lists, self._written, strict=True)):
                if written < len(blocks):
                    self._table[row, written : len(blocks)] = blocks[written:]
        self._lists, self._written = lists, lengths
        return np.ascontiguousarray(self._table[:, :most])

    def _arrange(self, lists: list[list[int]], most: int) -> None:
        """Puts the rows into the order of `lists`; those of new ones are empty."""
        # The lists are still held here, so that no new one can have the id of an old one.
        known = {id(blocks): row for row, blocks in enumerate(self._lists)}
        before = [known.get(id(blocks), -1) for blocks in lists]
        # The table has room for some blocks more, so that not every appended block makes a new array.
        table = np.zeros((len(lists), most + most // 4 + 1), dtype=np.int64)
        rows = [row for row, old in enumerate(before) if old >= 0]
        width = min(table.shape[1], self._table.shape[1])
        table[rows, :width] = self._table[[before[row] for row in rows], :width]
        self._written = [0 if old < 0 else self._written[old] for old in before]
        self._table = table
