"""The tables that live across steps hold programs as rows of whole numbers and of floats, their vectors, their receipt
counters and their latches.

A program is written into the tables once, when its request is admitted. From then on a step names rows. A *slot* is a
program at given strengths: a session that changes a strength gets another slot from that token on, and the old one
stays for tokens that may have to be computed again. Whole numbers and floats are on the host, where plans are made of
them; slots.py keeps a copy where kernels read them.
"""

from dataclasses import dataclass, field
from itertools import count

import numpy as np
import torch

from patchclamp_server.interventions.banks import VectorBank
from patchclamp_server.interventions.bound import BoundProgram
from patchclamp_server.interventions.columns import FLOAT_COLUMNS, INT_COLUMNS, PLACE
from patchclamp_server.interventions.entries import ProgramEntries, ProgramWriter
from patchclamp_server.interventions.layout import ProgramLayout
from patchclamp_server.interventions.ranges import Ranges
from patchclamp_server.interventions.scopes import FloatArray, Int32Array

NEVER = torch.iinfo(torch.int64).max
_SLOTS = 256
# Entries and units have room for so many rows at first.
DEFAULT_ROWS = 4096
# The tables have room for so much from the start on CUDA: graphs read them where they were when captured, and a table
# that grows moves. 64 Mi elements are 16,384 vectors of width 4,096, and the units are 64 neurons in each of 32 layers
# of 512 requests.
CUDA_BANK_ELEMENTS = 2**26
CUDA_ENTRIES = 2**18
CUDA_UNITS = 2**20


@dataclass(eq=False)
class LoadedProgram:
    """The rows that one program holds in the tables. Units do not depend on strengths, so all its slots share them."""

    layout: ProgramLayout
    # Each edit has one row of counters and latches.
    counters: list[int]
    # These are all rows held in the banks, by width.
    held: dict[int, list[int]] = field(default_factory=dict)
    first_unit: int = 0
    n_units: int = 0
    # These are the numbers of its objects.
    objects: list[int] = field(default_factory=list)
    entries: ProgramEntries | None = None
    # `slots` has each slot by the position from which it applies; `runs` has the rows of entries of all slots.
    slots: dict[int, int] = field(default_factory=dict)
    runs: list[tuple[int, int]] = field(default_factory=list)

    @property
    def written(self) -> ProgramEntries:
        assert self.entries is not None
        return self.entries


class HostTables:
    """N entries and M units of all loaded programs; columns.py names their columns."""

    def __init__(self, entries: int, units: int) -> None:
        # Each slot has its first entry, the end of those that kernels run, and the end.
        self.extents = np.zeros((_SLOTS, 3), dtype=np.int64)
        self.ints = np.zeros((entries, INT_COLUMNS), dtype=np.int32)
        self.floats = np.zeros((entries, FLOAT_COLUMNS), dtype=np.float32)
        self.unit_ints = np.zeros((units, 2), dtype=np.int32)
        self.unit_numbers = np.zeros((units, 4), dtype=np.float32)


class Tables:
    """Gives out rows at admission and takes them back at the end."""

    def __init__(
        self,
        dtype: torch.dtype,
        device: torch.device,
        *,
        capacity: int = 1024,
        bank_elements: int = 0,
        entries: int = DEFAULT_ROWS,
        units: int = DEFAULT_ROWS,
    ) -> None:
        """Starts with `capacity` rows of counters, `entries` and `units`. A bank of vectors starts with room for
        `bank_elements` numbers, but for at least 256 vectors."""
        self.dtype = dtype
        self.device = device
        self._bank_elements = bank_elements
        self.banks: dict[int, VectorBank] = {}
        self.host = HostTables(entries, units)
        self._slots, self._entries, self._units = Ranges(_SLOTS), Ranges(entries), Ranges(units)
        # The columns are the number of rows edited, and the sum of |delta| / |h| over them.
        self.counts = torch.zeros((capacity, 2), dtype=torch.float64, device=device)
        # This is the position at which the latch of the edit first fired.
        self.latch = torch.full((capacity,), NEVER, dtype=torch.int64, device=device)
        self._free = list(range(capacity - 1, -1, -1))
        # What the rules of torch take whole, by the number in FIRST of its entry.
        self.objects: dict[int, object] = {}
        self._object_numbers = count(1)

    def bank(self, width: int) -> VectorBank:
        if width not in self.banks:
            rows = max(256, self._bank_elements // width)
            self.banks[width] = VectorBank(width, self.dtype, self.device, rows)
        return self.banks[width]

    # Banks may have been made in inference mode, and can only be written in it then.
    @torch.inference_mode()
    def load(self, program: BoundProgram) -> LoadedProgram:
        """Writes a program into the tables, with one copy to the device for each width of vector. A load that fails
        holds no rows."""
        loaded = LoadedProgram(ProgramLayout(program), self._acquire(len(program.edits)))
        try:
            self._write(loaded)
        except BaseException:
            self.release(loaded)
            raise
        return loaded

    def _write(self, loaded: LoadedProgram) -> None:
        writer = ProgramWriter(loaded.layout)
        for width, vectors in writer.vectors.items():
            loaded.held[width] = self.bank(width).store(torch.cat(vectors))
        writer.place(loaded.held)
        writer.hold(lambda held: self._hold(loaded, held))
        host, n = self.host, writer.n_units
        first = self._units.acquire(n)
        loaded.first_unit, loaded.n_units = first, n
        if n:
            host.unit_ints = _fitted(host.unit_ints, self._units.capacity)
            host.unit_numbers = _fitted(host.unit_numbers, self._units.capacity)
            writer.write_units(host.unit_ints[first : first + n], host.unit_numbers[first : first + n])
            self._units_written(slice(first, first + n))
        loaded.entries = writer.entries(first, loaded.counters)

    def _hold(self, loaded: LoadedProgram, held: object) -> int:
        number = next(self._object_numbers)
        self.objects[number] = held
        loaded.objects.append(number)
        return number

    def slot(self, loaded: LoadedProgram, start: int, strengths: FloatArray) -> int:
        """Returns the slot of a program from position `start` on, where its edits have the `strengths` [n_edits]."""
        slot = loaded.slots.get(start)
        if slot is None:
            slot = loaded.slots[start] = self._write_slot(loaded, strengths)
        return slot

    def _write_slot(self, loaded: LoadedProgram, strengths: FloatArray) -> int:
        entries, host = loaded.written, self.host
        n = len(entries.ints)
        slot, first = self._slots.acquire(1), self._entries.acquire(n)
        loaded.runs.append((first, n))
        host.extents = _fitted(host.extents, self._slots.capacity)
        host.extents[slot] = first, first + entries.n_kernel, first + n
        host.ints = _fitted(host.ints, self._entries.capacity)
        host.floats = _fitted(host.floats, self._entries.capacity)
        host.ints[first : first + n] = entries.ints
        host.floats[first : first + n] = entries.floats_at(strengths)
        self._slot_written(slot, first, entries.ints[: entries.n_kernel, PLACE])
        return slot

    def _units_written(self, rows: slice) -> None:
        """Is called after units are written; a subclass that keeps a copy overrides it."""

    def _slot_written(self, slot: int, first: int, places: Int32Array) -> None:
        """Is called after a slot is written: entries from `first` on that kernels run, at `places`. A subclass that
        keeps a copy overrides it."""

    @property
    def n_held(self) -> int:
        """Returns the number of rows that programs hold, of counters and of vectors."""
        banks = list(self.banks.values())
        return len(self.counts) - len(self._free) + sum(bank.n_held for bank in banks)

    def release(self, loaded: LoadedProgram) -> None:
        self._free.extend(loaded.counters)
        for width, rows in loaded.held.items():
            self.banks[width].release(rows)
        for slot in loaded.slots.values():
            self._slots.release(slot, 1)
        for first, n in loaded.runs:
            self._entries.release(first, n)
        self._units.release(loaded.first_unit, loaded.n_units)
        for number in loaded.objects:
            del self.objects[number]

    def read(self, loaded: LoadedProgram) -> np.ndarray:
        """Returns the counts [n_edits, 2] of a program."""
        counts: np.ndarray = self.counts[loaded.counters].cpu().numpy()
        return counts

    def _acquire(self, n: int) -> list[int]:
        while len(self._free) < n:
            old = len(self.counts)
            counts = torch.cat((self.counts, torch.zeros_like(self.counts)))
            # Both grow or neither: their rows are the same.
            self.latch = torch.cat((self.latch, torch.full_like(self.latch, NEVER)))
            self.counts = counts
            self._free.extend(range(2 * old - 1, old - 1, -1))
        if not n:
            return []
        rows = self._free[-n:][::-1]
        self.counts[rows] = 0.0
        self.latch[rows] = NEVER
        del self._free[-n:]
        return rows


def _fitted(data: np.ndarray, capacity: int) -> np.ndarray:
    """Returns `data` with at least `capacity` rows; what is written stays."""
    if len(data) >= capacity:
        return data
    return np.concatenate((data, np.zeros((capacity - len(data), *data.shape[1:]), dtype=data.dtype)))
