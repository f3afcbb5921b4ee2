"""The ring holds values of the last watched rows until they are counted: a column for each item of all watches and one
for the norm at each of their places.

A step leaves its rows here with one small call at each place that is visited, so that the cost of the statistics is
paid once for many rows. Rows are committed when their step has run; the next step overwrites those of a failed one.
"""

from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch

from patchclamp_server.monitoring.arrays import Ints

# A full ring has so many values: they take 2 ms to count on a CPU, and half a megabyte.
_VALUES = 2**17
_MOST_ROWS = 128


class Row(NamedTuple):
    """A watched token. Bit i of `watches` tells whether watch i of the layout counts it. `time` is that of
    time.monotonic()."""

    token_id: int
    position: int
    sequence: int
    generated: bool
    watches: int
    time: float


class Columns(NamedTuple):
    """Tells where a watch of W items finds its values. An item that has no norm gets any column."""

    items: Ints  # [W]
    places: Ints  # [places]: the norms of its places
    norms: Ints  # [W]: the norm of the place of each item

    @classmethod
    def of(cls, items: Ints, places: Ints, place_of: Ints) -> "Columns":
        """place_of [W] tells which place an item is at, -1 for none."""
        return cls(items, places, np.append(places, 0)[place_of])


@dataclass(eq=False, slots=True)
class Rows:
    """The n watched rows of a step."""

    index: Ints  # [n] of the batch
    kept: list[Row]

    def __len__(self) -> int:
        return len(self.kept)


class Ring:
    """`values` [capacity, columns] float32 is an array that `compiled` loops fill in, else a tensor on the device."""

    def __init__(self, columns: int, device: torch.device, *, compiled: bool) -> None:
        self.columns, self.device, self.compiled = columns, device, compiled
        self.capacity = max(1, min(_MOST_ROWS, _VALUES // max(columns, 1)))
        # These rows are committed; those before `counted` have been counted.
        self.kept: list[Row] = []
        self.counted = 0
        # This is where the running step writes, and its rows.
        self.at = 0
        self.step = Rows(np.zeros(0, dtype=np.int64), [])
        self._allocate()

    def _allocate(self) -> None:
        shape = (self.capacity, self.columns)
        if self.compiled:
            self.values: Any = np.empty(shape, dtype=np.float32)
        else:
            self.values = torch.empty(shape, dtype=torch.float32, device=self.device)

    @property
    def pending(self) -> int:
        return len(self.kept) - self.counted

    def has_room(self, n: int) -> bool:
        return len(self.kept) + n <= self.capacity

    def empty(self, n: int) -> None:
        """Makes room for `n` rows, when all have been counted."""
        assert not self.pending
        self.kept, self.counted = [], 0
        if n > self.capacity:
            self.capacity = 1 << (n - 1).bit_length()
            self._allocate()

    def begin(self, rows: Rows) -> None:
        """Tells that these rows are written next."""
        self.step, self.at = rows, len(self.kept)

    def commit(self, rows: Rows) -> None:
        self.kept += rows.kept

    def take(self) -> range:
        """Returns the committed rows that are to be counted now."""
        taken = range(self.counted, len(self.kept))
        self.counted = len(self.kept)
        return taken
