"""The programs of running requests in the form kernels read them: patchclamp_kernels.program_table.

A slot is a program at given strengths. A session that changes a strength gets another slot from that token on; the
old one stays for tokens that may have to be computed again.
"""

from collections import Counter, defaultdict
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from patchclamp_kernels.program_table import EntryKind, ProgramTable
from patchclamp_server.interventions.entries import Units, program_entries, program_units
from patchclamp_server.interventions.layout import ProgramLayout
from patchclamp_server.interventions.ranges import Ranges
from patchclamp_server.interventions.state import ProgramState
from patchclamp_server.interventions.tables import LoadedProgram, Tables
from patchclamp_server.model.arrays import IntArray
from patchclamp_server.model.sites import FORWARD_ORDER


@dataclass(eq=False)
class WrittenProgram:
    """What one program holds in the tables. Units do not depend on strengths: all its slots share them."""

    layout: ProgramLayout
    units: Units
    first_unit: int
    # Slot by the position from which it counts.
    slots: dict[int, int] = field(default_factory=dict)
    entries: list[tuple[int, int]] = field(default_factory=list)
    # Kinds of the entries of one slot, by place; all slots have the same.
    kinds: dict[int, Counter[EntryKind]] = field(default_factory=dict)


class SlotTables(Tables):
    """Tables for the kernels: rows are written when a program first runs, and once for every change of strength."""

    def __init__(
        self,
        n_layers: int,
        dtype: torch.dtype,
        device: torch.device,
        *,
        bank_elements: int = 0,
        entries: int = 4096,
        units: int = 4096,
    ) -> None:
        """`entries` and `units`: rows to begin with."""
        super().__init__(dtype, device, bank_elements=bank_elements)
        self.n_places = n_layers * len(FORWARD_ORDER)
        self._slots, self._entries, self._units = Ranges(256), Ranges(entries), Ranges(units)
        self._written: dict[LoadedProgram, WrittenProgram] = {}
        self.ranges = torch.zeros((256, self.n_places + 1), dtype=torch.int32, device=device)
        self.ints = torch.zeros((entries, 8), dtype=torch.int32, device=device)
        self.floats = torch.zeros((entries, 4), dtype=torch.float32, device=device)
        self.unit_ints = torch.zeros((units, 2), dtype=torch.int32, device=device)
        self.unit_numbers = torch.zeros((units, 4), dtype=torch.float32, device=device)

    @property
    def table(self) -> ProgramTable:
        return ProgramTable(self.ranges, self.ints, self.floats, self.unit_ints, self.unit_numbers, self.latch)

    def written(self, state: ProgramState) -> WrittenProgram:
        program = self._written.get(state.loaded)
        if program is None:
            program = self._write_units(state)
            self._written[state.loaded] = program
        return program

    def slots(self, state: ProgramState, positions: IntArray) -> IntArray:
        """Slots [n] of the program at `positions` [n]."""
        program = self.written(state)
        starts = sorted({start for history in state.strengths for start, _ in history} | {0})
        which = np.searchsorted(np.array(starts), positions, side="right") - 1
        slot = np.zeros(len(starts), dtype=np.int64)
        for i in np.unique(which).tolist():
            if starts[i] not in program.slots:
                program.slots[starts[i]] = self._write_slot(state, program, starts[i])
            slot[i] = program.slots[starts[i]]
        chosen: IntArray = slot[which]
        return chosen

    def release(self, loaded: LoadedProgram) -> None:
        super().release(loaded)
        program = self._written.pop(loaded, None)
        if program is None:
            return
        for slot in program.slots.values():
            self._slots.release(slot, 1)
        for first, n in program.entries:
            self._entries.release(first, n)
        self._units.release(program.first_unit, program.units.n)

    def _write_units(self, state: ProgramState) -> WrittenProgram:
        layout = ProgramLayout(state.bound)
        units = program_units(layout, state.loaded)
        first = self._units.acquire(units.n)
        if units.n:
            self.unit_ints = _fitted(self.unit_ints, self._units.capacity)
            self.unit_numbers = _fitted(self.unit_numbers, self._units.capacity)
            rows = slice(first, first + units.n)
            self.unit_ints[rows] = torch.from_numpy(np.concatenate(units.ints)).to(self.device)
            self.unit_numbers[rows] = torch.from_numpy(np.concatenate(units.numbers)).to(self.device)
        return WrittenProgram(layout, units, first)

    def _write_slot(self, state: ProgramState, program: WrittenProgram, start: int) -> int:
        at = np.array([start], dtype=np.int64)
        strengths = [float(state.strength_at(i, at)[0]) for i in range(len(state.bound.edits))]
        entries = program_entries(state, program.layout, program.units, program.first_unit, strengths)
        slot, first = self._slots.acquire(1), self._entries.acquire(len(entries))
        program.entries.append((first, len(entries)))
        self.ranges = _fitted(self.ranges, self._slots.capacity)
        places = np.array([place for place, _ in entries], dtype=np.int64)
        upto = np.searchsorted(places, np.arange(self.n_places + 1), side="left")
        self.ranges[slot] = torch.from_numpy((first + upto).astype(np.int32)).to(self.device)
        if entries:
            self.ints = _fitted(self.ints, self._entries.capacity)
            self.floats = _fitted(self.floats, self._entries.capacity)
            rows = slice(first, first + len(entries))
            self.ints[rows] = torch.tensor([e.ints for _, e in entries], dtype=torch.int32).to(self.device)
            self.floats[rows] = torch.tensor([e.floats for _, e in entries], dtype=torch.float32).to(self.device)
        program.kinds = defaultdict(Counter)
        for place, entry in entries:
            program.kinds[place][entry.kind] += 1
        return slot


def _fitted(data: Tensor, capacity: int) -> Tensor:
    """`data` with at least `capacity` rows; what is written stays."""
    if len(data) >= capacity:
        return data
    return torch.cat((data, data.new_zeros((capacity - len(data), *data.shape[1:]))))
