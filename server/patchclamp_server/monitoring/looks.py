"""A look reads the activations of a place and writes the values of its items into the ring.

    neurons, heads: x[u]        directions, numbers of probes: p = x · v + bias
    features: p if p > max(0, jump) else 0        probabilities of probes: 1 / (1 + exp(-p))
    of each place but those of heads, ‖x‖ too, which tells outliers (outliers.py)

On a CPU one native call does a place, found by its number in one table. The arithmetic costs little there: the weights
of a layer have just gone through the caches, and each object that Python touches at a place is fetched from memory
again. So no object belongs to one place alone.
"""

# What numba compiles has no types for mypy.
# mypy: disable-error-code="no-untyped-call, no-untyped-def"

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import count
from typing import Any, Protocol

import numba
import numpy as np
import torch
from numba import types
from numpy.typing import NDArray
from torch import Tensor

from patchclamp_server.cpu.atomics import floats_at, ints_at
from patchclamp_server.monitoring.arrays import Ints
from patchclamp_server.monitoring.ring import Ring, Rows

# The cut of a probability, which stands for the logistic function: no projection is below it.
LOGISTIC = -torch.inf
# A plain loop projects up to so many rows sooner than torch, whose call alone takes 5 us.
_FEW_ROWS = 8


@dataclass(frozen=True, eq=False)
class Gathered:
    """Reads some columns of x [T, width]: neurons, or heads, whose x are probabilities that have no norm."""

    units: Ints
    width: int
    has_norm: bool = True

    def __len__(self) -> int:
        return len(self.units)


@dataclass(frozen=True, eq=False)
class Projected:
    """Computes p = x · v + bias, and 0 where p is at most `cut`: max(0, jump) for features. A NaN cuts nothing, and
    LOGISTIC makes a probability of p."""

    vectors: Tensor  # [k, width] float32
    bias: Tensor  # [k]
    cut: Tensor  # [k]

    def __len__(self) -> int:
        return len(self.vectors)

    @property
    def has_norm(self) -> bool:
        return True

    @property
    def width(self) -> int:
        return self.vectors.shape[1]

    def of(self, x: Tensor) -> Tensor:
        """Returns p [n, k] of x [n, width] float32."""
        p = torch.addmm(self.bias, x, self.vectors.t())
        return torch.where(self.cut == LOGISTIC, torch.sigmoid(p), torch.where(p <= self.cut, 0.0, p))

    def on(self, device: torch.device) -> "Projected":
        return Projected(*(t.to(device).contiguous() for t in (self.vectors, self.bias, self.cut)))


class Looks(Protocol):
    """Places have numbers. Their items follow each other in the columns of the ring, and all norms come last."""

    def begin(self, rows: Rows) -> None:
        """Tells that the places visited next belong to a step with these rows."""

    @property
    def compiled(self) -> tuple[int, int] | None:
        """Returns the addresses of a C function that does in this step what `look` does, given that of x, the number
        and the second address; None where there is none."""
        ...

    @property
    def look(self) -> Callable[[int, Tensor], None]:
        """Reads place `number` in this step; x [T, width] is after all edits."""


def looks_at(places: Sequence[Gathered | Projected], ring: Ring) -> Looks:
    return CompiledLooks(places, ring) if ring.compiled else OperatorLooks(places, ring)


class OperatorLooks:
    """Reads places by torch operators, on the device."""

    compiled = None

    def __init__(self, places: Sequence[Gathered | Projected], ring: Ring) -> None:
        self._ring = ring
        self._places = [
            torch.from_numpy(place.units).to(ring.device) if isinstance(place, Gathered) else place.on(ring.device)
            for place in places
        ]
        self._columns, self._norms = _columns(places), _norm_columns(places)

    def begin(self, rows: Rows) -> None:
        self._ring.begin(rows)
        self._index = torch.from_numpy(rows.index).to(self._ring.device)

    def look(self, number: int, x: Tensor) -> None:
        ring, place = self._ring, self._places[number]
        own = x.index_select(0, self._index).float()
        into = ring.values[ring.at : ring.at + len(own)]
        into[:, self._columns[number]] = place.of(own) if isinstance(place, Projected) else own.index_select(1, place)
        if self._norms[number] >= 0:
            into[:, self._norms[number]] = own.norm(dim=1)


class CompiledLooks:
    """Reads places by a loop that numba compiles. Projections of many rows are left to torch."""

    def __init__(self, places: Sequence[Gathered | Projected], ring: Ring) -> None:
        self._ring = ring
        self._columns, self._norms = _columns(places), _norm_columns(places)
        self._projected = {number: place for number, place in enumerate(places) if isinstance(place, Projected)}
        units = [place.units for place in places if isinstance(place, Gathered)]
        vectors = [
            torch.cat((place.vectors, place.bias[:, None], place.cut[:, None]), dim=1).flatten()
            for place in self._projected.values()
        ]
        table, n_units, n_floats = [], 0, 0
        for place, columns, norm in zip(places, self._columns, self._norms, strict=True):
            projected = isinstance(place, Projected)
            begin = n_floats if projected else n_units
            table.append((place.width, columns.start, len(place), begin, projected, norm))
            if projected:
                n_floats += len(place) * (place.width + 2)
            else:
                n_units += len(place)
        # These are kept, since the loop has only their addresses.
        self._tables: list[NDArray[Any]] = [
            np.array(table, dtype=np.int64),
            np.concatenate([*units, np.zeros(0, dtype=np.int64)]),
            torch.cat([*vectors, torch.zeros(0)]).numpy(),
        ]
        self._rows, self._values = np.zeros(ring.capacity, dtype=np.int64), ring.values
        arrays = [*self._tables, self._rows, self._values]
        self._state = np.array([*map(_address, arrays), ring.columns, 0, 0], dtype=np.int64)  # see _look_at
        self._look_by_loop = _look(_address(self._state))
        # Of a step whose look is the loop: the address of a C function, and of its last argument.
        function: Any = look_function.address
        self.function: int = function
        self.state = _address(self._state)
        self.look = self._look_by_loop

    def begin(self, rows: Rows) -> None:
        ring, n = self._ring, len(rows)
        ring.begin(rows)
        if ring.values is not self._values:
            self._rows, self._values = np.zeros(ring.capacity, dtype=np.int64), ring.values
            self._state[3:5] = _address(self._rows), _address(self._values)
        self._rows[:n] = rows.index
        self._state[6], self._state[7] = n, ring.at
        self.look = self._look_by_loop if n <= _FEW_ROWS else self._look_at_many

    @property
    def compiled(self) -> tuple[int, int] | None:
        return (self.function, self.state) if self.look is self._look_by_loop else None

    def _look_at_many(self, number: int, x: Tensor) -> None:
        if number not in self._projected:
            self._look_by_loop(number, x)
            return
        ring = self._ring
        own = x.index_select(0, torch.from_numpy(ring.step.index)).float()
        into = ring.values[ring.at : ring.at + len(own)]
        into[:, self._columns[number]] = self._projected[number].of(own).numpy()
        into[:, self._norms[number]] = own.norm(dim=1).numpy()


def _look(state_at: int) -> Callable[[int, Tensor], None]:
    float32 = torch.float32

    def look(number: int, x: Tensor) -> None:
        if x.dtype is not float32 or not x.is_contiguous():
            x = x.float().contiguous()
        _look_at(x.data_ptr(), number, state_at)

    return look


def _columns(places: Sequence[Gathered | Projected]) -> list[slice]:
    ends = np.cumsum([len(place) for place in places]).tolist()
    return [slice(end - len(place), end) for place, end in zip(places, ends, strict=True)]


def _norm_columns(places: Sequence[Gathered | Projected]) -> list[int]:
    """Returns the column of each place's norm; -1 where it has none."""
    behind = count(sum(map(len, places)))
    return [next(behind) if place.has_norm else -1 for place in places]


def _address(array: NDArray[Any]) -> int:
    assert array.flags.c_contiguous
    address: int = array.__array_interface__["data"][0]
    return address


def warm_up() -> None:
    """Compiles what runs on a CPU, or reads it from the disk."""
    looks = CompiledLooks([Gathered(np.zeros(1, dtype=np.int64), 1)], Ring(2, torch.device("cpu"), compiled=True))
    looks.begin(Rows(np.zeros(1, dtype=np.int64), []))
    looks.look(0, torch.zeros(1, 1))


@numba.njit(fastmath={"contract", "reassoc"}, nogil=True, cache=True)
def _look_at(x_at, number, state_at):
    """Reads one place. `state` holds: the addresses of the table, units, vectors, rows and the ring's values, how many
    columns these have, how many rows there are, and which row of the ring is the first of them. A row of the table
    holds: width of x, first column, number of items, where they begin in the units or vectors, whether they are
    vectors, which have bias and cut behind them, and the column of the norm, or -1."""
    state = ints_at(state_at)
    table, rows, columns, n_rows = ints_at(state[0]), ints_at(state[3]), state[5], state[6]
    x, values = floats_at(x_at), floats_at(state[4])
    place = 6 * number
    width, first, n, begin = table[place], table[place + 1], table[place + 2], table[place + 3]
    norm = table[place + 5]
    units, vectors = ints_at(state[1]), floats_at(state[2])
    for i in range(n_rows):
        own, into = rows[i] * width, (state[7] + i) * columns + first
        if not table[place + 4]:
            for j in range(n):
                values[into + j] = x[own + units[begin + j]]
        else:
            for j in range(n):
                vector = begin + j * (width + 2)
                p = np.float32(0)
                for d in range(width):
                    p += vectors[vector + d] * x[own + d]
                p += vectors[vector + width]
                cut = vectors[vector + width + 1]
                if cut == -np.inf:
                    p = np.float32(1.0 / (1.0 + math.exp(-p)))
                elif p <= cut:
                    p = np.float32(0)
                values[into + j] = p
        if norm >= 0:
            squares = np.float32(0)
            for d in range(width):
                squares += x[own + d] * x[own + d]
            values[(state[7] + i) * columns + norm] = np.sqrt(squares)


@numba.cfunc(types.void(types.int64, types.int64, types.int64), cache=True)
def look_function(x_at, number, state_at):
    """Reads one place, as compiled blocks call it."""
    _look_at(x_at, number, state_at)
