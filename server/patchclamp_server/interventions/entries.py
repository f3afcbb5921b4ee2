"""Writes a program down as entries and units of patchclamp_kernels.program_table, at given strengths."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np

from patchclamp_kernels.program_table import (
    FACTOR,
    NO_GATE,
    OFFSET,
    OTHER,
    UNIT,
    UNIT_HIGH,
    UNIT_LOW,
    EntryFlag,
    EntryKind,
)
from patchclamp_server.interventions.bound import BoundCondition, BoundEdit, Kind
from patchclamp_server.interventions.layout import ProgramLayout, distinct
from patchclamp_server.interventions.program import NeuronReadout
from patchclamp_server.interventions.state import ProgramState
from patchclamp_server.interventions.tables import EditRows, FloatArray, LoadedProgram
from patchclamp_server.model.sites import place_number

_KINDS = {
    Kind.ADD: EntryKind.ADD,
    Kind.PROJECT: EntryKind.PROJECT,
    Kind.REPLACE: EntryKind.REPLACE,
    Kind.ROTATE: EntryKind.ROTATE,
    Kind.LOW_RANK: EntryKind.LOW_RANK,
    Kind.NEURONS: EntryKind.NEURONS,
    Kind.HEADS: EntryKind.HEADS,
}
NO_FLAGS = EntryFlag(0)


@dataclass(frozen=True)
class Entry:
    """One row of ProgramTable.ints and .floats, by column."""

    kind: EntryKind
    item: int
    first: int
    flags: EntryFlag = NO_FLAGS
    count: int = 0
    gate: int = NO_GATE
    latch: int = 0
    column: int = 0
    strength: float = 0.0
    low: float = 0.0
    high: float = 0.0

    @property
    def ints(self) -> tuple[int, ...]:
        return (self.kind, self.item, self.flags, self.first, self.count, self.gate, self.latch, self.column)

    @property
    def floats(self) -> tuple[float, ...]:
        return (self.strength, self.low, self.high, 0.0)


@dataclass(eq=False)
class Units:
    """Units of all edits and readouts of a program, in one run of rows."""

    ints: list[np.ndarray] = field(default_factory=list)  # [n, 2] each
    numbers: list[FloatArray] = field(default_factory=list)  # [n, 4] each
    n: int = 0
    # First row, in the run, of ("edit" or "readout", index, layer).
    first: dict[tuple[str, int, int], int] = field(default_factory=dict)

    def add(self, key: tuple[str, int, int], ints: dict[int, np.ndarray], numbers: dict[int, FloatArray]) -> None:
        """Columns by number; those not given are 0. Rows ascend by the UNIT column, but for low rank."""
        n = len(ints[UNIT])
        whole, parts = np.zeros((n, 2), dtype=np.int32), np.zeros((n, 4), dtype=np.float32)
        for column, values in ints.items():
            whole[:, column] = values
        for column, values in numbers.items():
            parts[:, column] = values
        self.first[key] = self.n
        self.ints.append(whole)
        self.numbers.append(parts)
        self.n += n


def program_units(layout: ProgramLayout, loaded: LoadedProgram) -> Units:
    units = Units()
    for i, edit in enumerate(layout.bound.edits):
        for layer in edit.layers:
            _edit_units(units, ("edit", i, layer), edit.kind, loaded.edits[i][layer])
    for i, readout in enumerate(layout.readouts):
        if readout.kind is NeuronReadout:
            for layer in readout.layers:
                units.add(("readout", i, layer), {UNIT: np.array(distinct(readout))}, {})
    return units


def _edit_units(units: Units, key: tuple[str, int, int], kind: Kind, given: EditRows) -> None:
    if kind is Kind.NEURONS:
        order = np.argsort(given.numbers[0])
        index, factor, offset, low, high = (column[order] for column in given.numbers)
        units.add(key, {UNIT: index}, {FACTOR: factor, OFFSET: offset, UNIT_LOW: low, UNIT_HIGH: high})
    elif kind is Kind.HEADS:
        order = np.argsort(given.numbers[0])
        index, factor = (column[order] for column in given.numbers)
        units.add(key, {UNIT: index, OTHER: given.rows[order]}, {FACTOR: factor})
    elif kind is Kind.LOW_RANK:
        rotation, weight = np.split(given.rows, 2)
        units.add(key, {UNIT: rotation, OTHER: weight}, {OFFSET: given.numbers[0]})


def program_entries(
    state: ProgramState, layout: ProgramLayout, units: Units, first_unit: int, strengths: Sequence[float]
) -> list[tuple[int, Entry]]:
    """(place, entry) of everything the kernels do for a program, in the order in which they do it."""
    entries = [*_edits(state, layout, units, first_unit, strengths), *_conditions(state, layout)]
    entries += _readouts(state, layout, units, first_unit)
    # Edits of a place come before what looks at it; both keep the order of the program.
    return sorted(entries, key=lambda pair: pair[0])


def _edits(
    state: ProgramState, layout: ProgramLayout, units: Units, first_unit: int, strengths: Sequence[float]
) -> Iterator[tuple[int, Entry]]:
    for i, edit in enumerate(state.bound.edits):
        for layer in edit.layers:
            place = place_number(edit.site, layer)
            flags = EntryFlag.PRESERVE_NORM if edit.preserve_norm else NO_FLAGS
            if edit.latched:
                flags |= EntryFlag.LATCHED
            given = state.loaded.edits[i][layer]
            unit = units.first.get(("edit", i, layer))
            first, count = (int(given.rows[0]), 0) if unit is None else (first_unit + unit, _count(edit, given))
            gate = NO_GATE if edit.gate is None else layout.gated.index(i)
            low, high = edit.bounds
            latch = state.loaded.counters[i]
            yield (
                place,
                Entry(_KINDS[edit.kind], i, first, flags, count, gate, latch, 0, strengths[i], low, high),
            )


def _count(edit: BoundEdit, given: EditRows) -> int:
    return len(given.rows) // 2 if edit.kind is Kind.LOW_RANK else len(given.numbers[0])


def _conditions(state: ProgramState, layout: ProgramLayout) -> Iterator[tuple[int, Entry]]:
    loaded = state.loaded
    for column, i in enumerate(layout.gated):
        edit = state.bound.edits[i]
        assert edit.gate is not None
        item = layout.gate_item(i)
        yield _condition(edit.gate, item, loaded.gates[i], column, loaded.counters[i], edit.latched)
    for i, abort in enumerate(state.bound.aborts):
        column = layout.abort_column(i)
        yield _condition(abort.condition, layout.abort_item(i), loaded.aborts[i], column, 0, latched=False)


def _condition(
    condition: BoundCondition, item: int, vector: int, column: int, latch: int, latched: bool
) -> tuple[int, Entry]:
    flags = EntryFlag.COSINE if condition.cosine else NO_FLAGS
    if latched:
        flags |= EntryFlag.LATCHED
    entry = Entry(
        EntryKind.CONDITION,
        item,
        vector,
        flags,
        latch=latch,
        column=column,
        strength=condition.sign,
        low=condition.threshold,
    )
    return place_number(condition.site, condition.layer), entry


def _readouts(state: ProgramState, layout: ProgramLayout, units: Units, first_unit: int) -> Iterator[tuple[int, Entry]]:
    vectors = [v for r, v in zip(state.bound.readouts, state.loaded.readouts, strict=True) if r in layout.readouts]
    for i, readout in enumerate(layout.readouts):
        item = layout.readout_item(i)
        for layer in readout.layers:
            place = place_number(readout.site, layer)
            column, n = layout.reading_columns[i, layer]
            if readout.kind is NeuronReadout:
                first = first_unit + units.first["readout", i, layer]
                yield place, Entry(EntryKind.NEURON_VALUES, item, first, count=n, column=column)
                continue
            for j, row in enumerate(vectors[i][layer].tolist()):
                yield place, Entry(EntryKind.PROJECTION, item, row, column=column + j)
