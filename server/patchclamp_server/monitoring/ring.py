"""Values of the last rows that were watched, one column for each item of all watches, until somebody counts them.

A step leaves its rows here with one small call at each place that is visited: what the statistics cost is paid once for
many rows. Rows are committed when their step has run; those of a step that failed are overwritten by the next.
"""

# What numba compiles has no types for mypy.
# mypy: disable-error-code="no-untyped-call, no-untyped-def"

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import numba
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from patchclamp_server.monitoring.reference import Ints

# Values of a full ring: 2 ms to count on a CPU, and half a megabyte.
_VALUES = 2**17
_MOST_ROWS = 128
# Up to so many rows a plain loop projects them sooner than torch, whose call alone takes 5 us.
_FEW_ROWS = 8
# Up to so many rows the neurons of all layers are held whole until the step ends, 30 x 12 KiB. Of more, their memory
# would be missed by the layers that follow, which find the same few lines in the caches otherwise.
_ROWS_TO_HOLD = 2


class Row(NamedTuple):
    """A watched token. Bit i of `watches`: whether watch i of the layout counts it. `time`: of time.monotonic()."""

    token_id: int
    position: int
    sequence: int
    generated: bool
    watches: int
    time: float


@dataclass(frozen=True, eq=False)
class Rows:
    """n watched rows of a step."""

    index: Ints  # [n] of the batch
    kept: list[Row]

    def __len__(self) -> int:
        return len(self.kept)


class Ring:
    """`values` [capacity, columns] float32: an array where `compiled` loops fill it in, else a tensor on the device."""

    def __init__(self, columns: int, device: torch.device, *, compiled: bool) -> None:
        self.columns, self.device, self.compiled = columns, device, compiled
        self.capacity = max(1, min(_MOST_ROWS, _VALUES // max(columns, 1)))
        # Committed rows, of which those before `counted` have been counted.
        self.kept: list[Row] = []
        self.counted = 0
        # Where the step that runs writes, and its rows.
        self.at = 0
        self.step = Rows(np.zeros(0, dtype=np.int64), [])
        self.index: Any = None
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
        """What the places are visited with next belongs to these."""
        self.step, self.at = rows, len(self.kept)
        self.index = rows.index if self.compiled else torch.from_numpy(rows.index).to(self.device)

    def commit(self, rows: Rows) -> None:
        self.kept += rows.kept

    def take(self) -> range:
        """Committed rows that are to be counted now."""
        taken = range(self.counted, len(self.kept))
        self.counted = len(self.kept)
        return taken


class Gather:
    """Copies some columns of the rows: neurons, or heads."""

    def __init__(self, ring: Ring, first: int, units: Ints) -> None:
        self._ring, self._first, self._units = ring, first, units
        self._end = first + len(units)
        self.index = torch.from_numpy(units).to(ring.device)
        self._block = np.zeros(len(units), dtype=np.int64)

    def run(self, x: Tensor, context: object = None) -> None:
        """x [T, width], after all edits."""
        ring = self._ring
        if ring.compiled:
            _gather(as_array(x), 0, ring.index, self._block, self._units, ring.values, ring.at, self._first)
        else:
            values = x.index_select(0, ring.index).index_select(1, self.index)
            ring.values[ring.at : ring.at + len(values), self._first : self._end] = values


class Neurons:
    """The neurons of all layers, in the order of the layers. Nothing writes to them once their place is passed."""

    def __init__(self, ring: Ring, units: Mapping[int, Ints]) -> None:
        """`units` by layer: the first columns of the ring."""
        self._ring = ring
        self._held: list[Tensor] = []
        self._block = np.repeat(np.arange(len(units)), [len(own) for own in units.values()])
        self._units = np.concatenate([*units.values(), np.zeros(0, dtype=np.int64)])
        self.looks: dict[int, NeuronsAt] = {}
        first = 0
        for layer, own in units.items():
            self.looks[layer] = NeuronsAt(ring, self._held, Gather(ring, first, own))
            first += len(own)

    def begin(self) -> None:
        # Of a step that failed.
        self._held.clear()

    def end(self) -> None:
        """Copies what is held."""
        if not self._held:
            return
        assert len(self._held) == len(self.looks)
        ring, rows = self._ring, len(self._held[0])
        if rows <= _ROWS_TO_HOLD:
            every = as_array(torch.cat(self._held))
            _gather(every, rows, ring.index, self._block, self._units, ring.values, ring.at, 0)
        else:
            every = torch.cat(self._held, dim=1).float().numpy()
            ring.values[ring.at : ring.at + len(ring.index), : len(self._units)] = every[ring.index]
        self._held.clear()


class NeuronsAt:
    """At one layer. One row or two are held as they are: a call costs more than what it copies, and far more between
    two layers than after the last, when the weights of a layer have just gone through the caches."""

    def __init__(self, ring: Ring, held: list[Tensor], gather: Gather) -> None:
        self._ring, self._held, self._gather = ring, held, gather

    def run(self, x: Tensor, context: object = None) -> None:
        if self._ring.compiled:
            self._held.append(x if len(x) <= _ROWS_TO_HOLD else x.index_select(1, self._gather.index))
        else:
            self._gather.run(x)


class Project:
    """p = h · v + bias of some vectors, and 0 where p is at most `cut`: max(0, jump) for features. NaN cuts nothing."""

    def __init__(self, ring: Ring, first: int, vectors: Tensor, bias: Tensor, cut: Tensor) -> None:
        self._ring, self._first, self._end = ring, first, first + len(vectors)
        self._vectors, self._bias, self._cut = (t.to(ring.device).contiguous() for t in (vectors, bias, cut))
        self._arrays = [t.contiguous().numpy() for t in (vectors, bias, cut)]

    def run(self, x: Tensor, context: object = None) -> None:
        ring = self._ring
        if ring.compiled and len(ring.step) <= _FEW_ROWS:
            vectors, bias, cut = self._arrays
            _project(as_array(x), ring.index, vectors, bias, cut, ring.values, ring.at, self._first)
            return
        rows = torch.from_numpy(ring.index) if ring.compiled else ring.index
        p = torch.addmm(self._bias, x.index_select(0, rows).float(), self._vectors.t())
        p = torch.where(p <= self._cut, 0.0, p)
        ring.values[ring.at : ring.at + len(p), self._first : self._end] = p.numpy() if ring.compiled else p


# What happens at a place: places see x and what operators share.
Look = NeuronsAt | Project


def as_array(x: Tensor) -> NDArray[np.float32]:
    """x as it is, for the compiled loops; a copy in float32 of what they were not compiled for."""
    if x.dtype is not torch.float32 or not x.is_contiguous():
        x = x.float().contiguous()
    array: NDArray[np.float32] = x.numpy()
    return array


def warm_up() -> None:
    """Compiles what runs on a CPU, or reads it from the disk."""
    ring = Ring(1, torch.device("cpu"), compiled=True)
    one = torch.zeros(1, 1)
    ring.begin(Rows(np.zeros(1, dtype=np.int64), []))
    Gather(ring, 0, np.zeros(1, dtype=np.int64)).run(one)
    Project(ring, 0, one, one[0], one[0]).run(one)


@numba.njit(nogil=True, cache=True)
def _gather(x, rows_of_block, rows, block, units, values, at, first):
    """Row i of block b is x[b * rows_of_block + rows[i]]."""
    for i in range(rows.shape[0]):
        for j in range(units.shape[0]):
            values[at + i, first + j] = x[block[j] * rows_of_block + rows[i], units[j]]


@numba.njit(fastmath={"contract", "reassoc"}, nogil=True, cache=True)
def _project(x, rows, vectors, bias, cut, values, at, first):
    for i in range(rows.shape[0]):
        row = rows[i]
        for j in range(vectors.shape[0]):
            p = np.float32(0)
            for d in range(vectors.shape[1]):
                p += vectors[j, d] * x[row, d]
            p += bias[j]
            if p <= cut[j]:
                p = np.float32(0)
            values[at + i, first + j] = p
