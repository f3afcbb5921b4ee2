"""Writes a program down as entries and units of the tables (columns.py). All but the strengths of its edits are written
once, when its request is admitted."""

from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from torch import Tensor

from patchclamp_server.interventions.bound import BoundCondition, BoundReadout
from patchclamp_server.interventions.columns import (
    FLOAT_COLUMNS,
    INT_COLUMNS,
    ITEM,
    KIND,
    NO_GATE,
    PLACE,
    STRENGTH,
    EntryFlag,
    EntryKind,
)
from patchclamp_server.interventions.kinds import EDIT_TABLES, READOUT_TABLES
from patchclamp_server.interventions.kinds.kind import UnitColumns, Written
from patchclamp_server.interventions.layout import ProgramLayout
from patchclamp_server.interventions.scopes import FloatArray, Int32Array
from patchclamp_server.interventions.stages import stages
from patchclamp_server.model.arrays import IntArray
from patchclamp_server.model.sites import FORWARD_ORDER, PREACTIVATION_SITES, Site, place_number

# The edits of a place come first, stage after stage (a program has at most 256), and then the conditions and readouts.
_AFTER_EDITS = 511
# The activation kernel runs these kinds itself; any other kind at the neurons is run on whole rows.
_ACTIVATION_KINDS = (EntryKind.NEURONS, EntryKind.NEURON_VALUES)
NO_FLAGS = EntryFlag(0)
_Row = tuple[tuple[int, ...], tuple[float, ...]]


@dataclass(frozen=True, eq=False)
class Launches:
    """What entries make a step launch. The flags say whether there are entries at the queries, at the heads and at the
    neurons, entries at the neurons that need whole rows, and entries at their gates or ups. `most_neuron_entries` is
    the largest number of entries at the neurons of one layer."""

    attn_q: bool = False
    attn_z: bool = False
    neurons: bool = False
    neuron_rows: bool = False
    preactivations: bool = False
    most_neuron_entries: int = 0

    def __or__(self, other: "Launches") -> "Launches":
        return Launches(
            self.attn_q or other.attn_q,
            self.attn_z or other.attn_z,
            self.neurons or other.neurons,
            self.neuron_rows or other.neuron_rows,
            self.preactivations or other.preactivations,
            max(self.most_neuron_entries, other.most_neuron_entries),
        )


@dataclass(frozen=True, eq=False)
class ProgramEntries:
    """Rows of the tables, sorted by place. Kernels run the first `n_kernel`."""

    ints: Int32Array  # [n, INT_COLUMNS]
    floats: FloatArray  # float32 [n, FLOAT_COLUMNS], with no strengths of edits yet
    n_kernel: int
    edits: IntArray  # which of the rows are edits

    @cached_property
    def launches(self) -> Launches:
        kinds, places = self.ints[: self.n_kernel, KIND], self.ints[: self.n_kernel, PLACE]
        site = places % len(FORWARD_ORDER)
        neurons = site == Site.MLP_POST.order
        return Launches(
            attn_q=bool((site == Site.ATTN_Q.order).any()),
            attn_z=bool((site == Site.ATTN_Z.order).any()),
            neurons=bool(neurons.any()),
            neuron_rows=not np.isin(kinds[neurons], _ACTIVATION_KINDS).all(),
            preactivations=bool(np.isin(site, [site.order for site in PREACTIVATION_SITES]).any()),
            most_neuron_entries=int(np.bincount(places[neurons]).max(initial=0)),
        )

    def floats_at(self, strengths: FloatArray) -> FloatArray:
        """Returns `floats` with the given strengths [n_edits] filled in."""
        floats = self.floats.copy()
        floats[self.edits, STRENGTH] = strengths[self.ints[self.edits, ITEM]]
        return floats


@dataclass(eq=False)
class _Numbers:
    """What one edit, condition or readout has at a layer: n vectors of a width, from `start` on, and units."""

    written: Written
    width: int = 0
    start: int = 0
    n: int = 0
    first_unit: int = 0
    units: UnitColumns | None = None
    held: int = 0

    def spots(self, rows: IntArray, first_unit: int) -> list[tuple[int, int]]:
        """Returns FIRST and COUNT of its entries: one for all units, one for each vector, or one without either."""
        if self.units is not None:
            return [(first_unit + self.first_unit, len(self.units))]
        return [(row, 0) for row in rows.tolist()] or [(self.held, self.written.count)]


class ProgramWriter:
    """Collects the numbers of a program, and writes its entries once their rows in the tables are known."""

    def __init__(self, layout: ProgramLayout) -> None:
        self.layout = layout
        self.vectors: dict[int, list[Tensor]] = defaultdict(list)
        self.n_units = 0
        self._n_vectors: dict[int, int] = defaultdict(int)
        self._rows: dict[int, IntArray] = {}
        bound = layout.bound
        self._edits = [
            [self._add(EDIT_TABLES[edit.kind].write(edit.payload[layer])) for layer in edit.layers]
            for edit in bound.edits
        ]
        self._inputs = [
            [self._add(READOUT_TABLES[edit.input.kind].write(edit.input, edit.input.layers[0]))]
            for edit in bound.edits
            if edit.input is not None
        ]
        gates = [gate for edit in bound.edits if (gate := edit.gate) is not None]
        self._gates = [self._add(Written(gate.unit[None])) for gate in gates]
        self._aborts = [self._add(Written(abort.condition.unit[None])) for abort in bound.aborts]
        self._readouts = [
            [self._add(READOUT_TABLES[readout.kind].write(readout, layer)) for layer in readout.layers]
            for readout in layout.items_read
        ]

    def _add(self, written: Written) -> _Numbers:
        if written.vectors is None:
            return _Numbers(written)
        n, width = written.vectors.shape
        start = self._n_vectors[width]
        self.vectors[width].append(written.vectors)
        self._n_vectors[width] += n
        return _Numbers(written, width, start, n)

    def hold(self, numbered: Callable[[object], int]) -> None:
        """Sets the number by which the rule of each object finds it."""
        for own in (*self._edits, *self._readouts):
            for numbers in own:
                if numbers.written.held is not None:
                    numbers.held = numbered(numbers.written.held)

    def place(self, held: dict[int, list[int]]) -> None:
        """Sets the rows `held` of its vectors in the bank of each width, and makes the units, which name those rows."""
        self._rows = {width: np.array(rows, dtype=np.int64) for width, rows in held.items()}
        for numbers in self._with_units():
            assert numbers.written.units is not None
            numbers.units = numbers.written.units(self._rows_of(numbers))
            numbers.first_unit = self.n_units
            self.n_units += len(numbers.units)

    def _with_units(self) -> Iterator[_Numbers]:
        every = (*self._edits, *self._inputs, *self._readouts)
        return (numbers for own in every for numbers in own if numbers.written.units)

    def _rows_of(self, numbers: _Numbers) -> IntArray:
        if not numbers.n:
            return np.empty(0, dtype=np.int64)
        rows: IntArray = self._rows[numbers.width][numbers.start : numbers.start + numbers.n]
        return rows

    def write_units(self, ints: Int32Array, floats: FloatArray) -> None:
        """Fills [n_units, columns] of the tables of units."""
        ints[:], floats[:] = 0, 0.0
        for numbers in self._with_units():
            assert numbers.units is not None
            own = slice(numbers.first_unit, numbers.first_unit + len(numbers.units))
            for column, whole in numbers.units.ints.items():
                ints[own, column] = whole
            for column, parts in numbers.units.numbers.items():
                floats[own, column] = parts

    def entries(self, first_unit: int, counters: list[int]) -> ProgramEntries:
        """Returns the entries. `first_unit` is the row of its units; `counters` has each edit's row of counts and
        latch."""
        rows = [
            *self._edit_rows(first_unit, counters),
            *self._input_rows(first_unit),
            *self._condition_rows(counters),
            *self._readout_rows(first_unit),
        ]
        ints = np.array([whole for whole, _ in rows], dtype=np.int32).reshape(-1, INT_COLUMNS)
        floats = np.array([parts for _, parts in rows], dtype=np.float32).reshape(-1, FLOAT_COLUMNS)
        behind = ints[:, KIND] >= EntryKind.TOP_NEURONS
        # Edits of a place come before its conditions and readouts; both keep the order of the program.
        order = np.lexsort((ints[:, PLACE], behind))
        ints, floats = ints[order], floats[order]
        return ProgramEntries(ints, floats, int((~behind).sum()), np.flatnonzero(ints[:, KIND] < EntryKind.CONDITION))

    def _edit_rows(self, first_unit: int, counters: list[int]) -> Iterator[_Row]:
        layout = self.layout
        stage = stages(layout.bound.edits)
        for i, edit in enumerate(layout.bound.edits):
            flags = EntryFlag.PRESERVE_NORM if edit.preserve_norm else NO_FLAGS
            if edit.latched:
                flags |= EntryFlag.LATCHED
            if edit.input is not None:
                flags |= EntryFlag.INPUT
            gate = NO_GATE if edit.gate is None else layout.gated.index(i)
            for layer, numbers in zip(edit.layers, self._edits[i], strict=True):
                [(first, count)] = numbers.spots(self._rows_of(numbers), first_unit)
                place = place_number(edit.site, layer)
                group = group_number(place, stage[i][layer], edit.kind, preserve_norm=edit.preserve_norm)
                column, _ = layout.input_columns.get(i, (0, 0))
                whole = (edit.kind, i, flags, first, count, gate, counters[i], column, place, group)
                yield whole, (0.0, *edit.bounds, 0.0)

    def _input_rows(self, first_unit: int) -> Iterator[_Row]:
        """Yields what edits take from earlier sites: their items are the edits, whose scopes they have."""
        layout, inputs = self.layout, iter(self._inputs)
        for i, (column, _) in layout.input_columns.items():
            given = layout.bound.edits[i].input
            assert given is not None
            [numbers] = next(inputs)
            kind, place = READOUT_TABLES[given.kind].entry, place_number(given.site, given.layers[0])
            yield from self._reading_rows(numbers, first_unit, kind, i, column, place, EntryFlag.INPUT)

    def _condition_rows(self, counters: list[int]) -> Iterator[_Row]:
        layout = self.layout
        for column, (i, numbers) in enumerate(zip(layout.gated, self._gates, strict=True)):
            edit = layout.bound.edits[i]
            assert edit.gate is not None
            yield self._condition(edit.gate, numbers, layout.gate_item(i), column, counters[i], latched=edit.latched)
        for i, (abort, numbers) in enumerate(zip(layout.bound.aborts, self._aborts, strict=True)):
            item, column = layout.abort_item(i), layout.abort_column(i)
            yield self._condition(abort.condition, numbers, item, column, 0, latched=False)

    def _condition(
        self, condition: BoundCondition, numbers: _Numbers, item: int, column: int, latch: int, *, latched: bool
    ) -> _Row:
        flags = EntryFlag.COSINE if condition.cosine else NO_FLAGS
        if latched:
            flags |= EntryFlag.LATCHED
        if condition.jump is not None:
            flags |= EntryFlag.FEATURE
        place = place_number(condition.site, condition.layer)
        group = group_number(place, _AFTER_EDITS, EntryKind.CONDITION)
        [vector] = self._rows_of(numbers).tolist()
        whole = (EntryKind.CONDITION, item, flags, vector, 0, NO_GATE, latch, column, place, group)
        return whole, (condition.sign, condition.threshold, condition.bias, condition.jump or 0.0)

    def _readout_rows(self, first_unit: int) -> Iterator[_Row]:
        layout = self.layout
        for i, (readout, own) in enumerate(zip(layout.items_read, self._readouts, strict=True)):
            item, kind = layout.readout_item(i), READOUT_TABLES[readout.kind].entry
            for layer, numbers in zip(readout.layers, own, strict=True):
                place, column = place_number(readout.site, layer), _first_column(layout, i, readout, layer)
                yield from self._reading_rows(numbers, first_unit, kind, item, column, place, NO_FLAGS)

    def _reading_rows(
        self, numbers: _Numbers, first_unit: int, kind: EntryKind, item: int, column: int, place: int, flags: EntryFlag
    ) -> Iterator[_Row]:
        group, latents = group_number(place, _AFTER_EDITS, kind), numbers.written.latents
        if latents is not None:
            flags |= EntryFlag.FEATURE
        for j, (first, count) in enumerate(numbers.spots(self._rows_of(numbers), first_unit)):
            bias, jump = (0.0, 0.0) if latents is None else latents[j]
            yield (kind, item, flags, first, count, NO_GATE, 0, column + j, place, group), (0.0, 0.0, bias, jump)


def _first_column(layout: ProgramLayout, i: int, readout: BoundReadout, layer: int) -> int:
    return layout.reading_columns[i, layer][0] if READOUT_TABLES[readout.kind].entry.in_kernels else 0


def group_number(place: int, stage: int, kind: EntryKind, *, preserve_norm: bool = False) -> int:
    """Returns the number of a group. Entries of one number run as one; groups of a place run in ascending order."""
    return ((place * (_AFTER_EDITS + 1) + stage) * 64 + kind) * 2 + preserve_norm


def place_of_group(group: int) -> tuple[int, EntryKind, EntryFlag]:
    """Returns the place, kind and flags that all entries of a group have."""
    rest, preserve_norm = divmod(group, 2)
    rest, kind = divmod(rest, 64)
    return rest // (_AFTER_EDITS + 1), EntryKind(kind), EntryFlag.PRESERVE_NORM if preserve_norm else NO_FLAGS
