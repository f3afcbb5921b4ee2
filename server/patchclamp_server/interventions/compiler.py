"""Compiles the programs of one step into operators at sites.

Which operators exist depends on the (site, layer, kind of edit) combinations in use, never on how many programs use
them: programs are entries in index tensors, and their numbers are rows of the device tables.
"""

from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from patchclamp_server.interventions.bound import BoundCondition, BoundEdit, BoundReadout, Kind
from patchclamp_server.interventions.layout import KERNEL_READOUTS
from patchclamp_server.interventions.observers import (
    AbortHit,
    AbortOperator,
    CaptureOperator,
    CaptureRows,
    LogitLensOperator,
    NeuronReadoutOperator,
    ProjectionOperator,
    Reading,
    ReadoutOperator,
    TopNeuronsOperator,
)
from patchclamp_server.interventions.operators import (
    AddOperator,
    AddPreservingOperator,
    ConditionOperator,
    Entries,
    GateOperator,
    HeadOperator,
    LowRankOperator,
    NeuronOperator,
    Operator,
    ProjectOperator,
    ReplaceOperator,
    RotateOperator,
    Units,
)
from patchclamp_server.interventions.plan import CaptureSpan, Place, ProgramSpan, StepPlan
from patchclamp_server.interventions.program import (
    HeadReadout,
    LogitLensReadout,
    NeuronReadout,
    ProjectionReadout,
    TopNeuronsReadout,
)
from patchclamp_server.interventions.scopes import scope_mask
from patchclamp_server.interventions.state import ProgramState
from patchclamp_server.interventions.tables import ZERO_ROW, EditRows, FloatArray, Tables
from patchclamp_server.model.arrays import BoolArray, IntArray
from patchclamp_server.model.sites import FORWARD_ORDER, Site


@dataclass(frozen=True, eq=False)
class Setting:
    """What a compiler knows of the model, and where the numbers of programs are."""

    tables: Tables
    n_heads: int
    head_dim: int
    widths: dict[Site, int]
    device: torch.device
    # [n, d_model] -> logits [n, vocab]
    unembed: Callable[[Tensor], Tensor]


@dataclass(frozen=True, eq=False)
class Group:
    """One edit of one sequence in this step."""

    edit: BoundEdit
    # Its rows in the tables, by layer.
    numbers: dict[int, EditRows]
    rows: IntArray  # [n] rows of the batch in scope
    strength: FloatArray  # [n]
    gate: IntArray | None  # [n] entries of StepContext.open
    counter: int
    counted: BoolArray  # [n]


@dataclass(frozen=True, eq=False)
class Asked:
    """A condition of one sequence: `unit` is the bank row of its vector."""

    condition: BoundCondition
    unit: int
    span: ProgramSpan
    state: ProgramState


@dataclass(frozen=True, eq=False)
class GateRows:
    asked: Asked
    # First of its entries in StepContext.open, one for each row of the span.
    first: int
    latched: bool
    latch: int


@dataclass(frozen=True, eq=False)
class Read:
    """A readout of one sequence: `vectors` are bank rows by layer, `mask` the rows of the span in scope."""

    readout: BoundReadout
    vectors: dict[int, IntArray]
    span: ProgramSpan
    state: ProgramState
    mask: BoolArray


class Compiler:
    """`only_observers`: leave out what the kernels do themselves, which is all but captures and the readouts that
    need whole rows."""

    def __init__(self, setting: Setting, spans: list[ProgramSpan], *, only_observers: bool = False) -> None:
        self.setting = setting
        self.spans = spans
        self.only_observers = only_observers
        self.device = setting.device
        # By place, and (stage, kind, preserve_norm).
        self.edits: dict[Place, dict[tuple[int, Kind, bool], list[Group]]] = defaultdict(lambda: defaultdict(list))
        self.gates: dict[Place, list[GateRows]] = defaultdict(list)
        self.aborts: dict[Place, list[tuple[str, Asked]]] = defaultdict(list)
        self.readouts: dict[Place, dict[type, list[Read]]] = defaultdict(lambda: defaultdict(list))
        self.captures: dict[Place, list[tuple[CaptureSpan, ProgramSpan]]] = defaultdict(list)
        self.n_open = 0
        self.operators: dict[Place, list[Operator]] = defaultdict(list)
        self.counters: list[Tensor] = []
        self.counted: list[Tensor] = []
        # Layers at which the same groups run share their index tensors.
        self.shared: dict[tuple[int, ...], tuple[Entries, Tensor, Tensor]] = {}

    def compile(self) -> StepPlan:
        for span in self.spans:
            if span.state is not None:
                self._collect(span, span.state)
            if span.capture is not None:
                for layer in span.capture.pool.layers:
                    self.captures[(span.capture.site, layer)].append((span.capture, span))
        places = {*self.edits, *self.gates, *self.aborts, *self.readouts, *self.captures}
        # In the order of the forward pass, which is the order in which receipts are counted.
        for place in sorted(places, key=lambda p: (p[1], FORWARD_ORDER.index(p[0]))):
            self._place(place)
        none = torch.empty(0, dtype=torch.int64, device=self.device)
        counter = torch.cat(self.counters) if self.counters else none
        counted = torch.cat(self.counted) if self.counted else none.double()
        return StepPlan(dict(self.operators), counter, counted, self.n_open, self.setting.tables)

    def _collect(self, span: ProgramSpan, state: ProgramState) -> None:
        positions = span.positions
        counted = positions >= state.counted
        if not self.only_observers:
            self._collect_edits(span, state, positions, counted)
        for readout, vectors in zip(state.bound.readouts, state.loaded.readouts, strict=True):
            if readout.kind is HeadReadout or (self.only_observers and readout.kind in KERNEL_READOUTS):
                continue
            mask = scope_mask(readout.scope, state.sequence, positions, span.token_ids) & counted
            if mask.any():
                for layer in readout.layers:
                    read = Read(readout, vectors, span, state, mask)
                    self.readouts[(readout.site, layer)][readout.kind].append(read)

    def _collect_edits(self, span: ProgramSpan, state: ProgramState, positions: IntArray, counted: BoolArray) -> None:
        loaded = state.loaded
        for i, edit in enumerate(state.bound.edits):
            first_open = self.n_open
            if edit.gate is not None:
                # A latch looks at every row, also where the edit itself is out of scope.
                asked = Asked(edit.gate, loaded.gates[i], span, state)
                gate = GateRows(asked, first_open, edit.latched, loaded.counters[i])
                self.gates[(edit.gate.site, edit.gate.layer)].append(gate)
                self.n_open += len(positions)
            mask = state.edit_mask(edit, positions, span.token_ids)
            if not mask.any():
                continue
            local = np.flatnonzero(mask)
            group = Group(
                edit,
                loaded.edits[i],
                span.row + local,
                state.strength_at(i, positions[local]),
                first_open + local if edit.gate is not None else None,
                loaded.counters[i],
                counted[local],
            )
            for layer in edit.layers:
                key = (state.stages[i][layer], edit.kind, edit.preserve_norm)
                self.edits[(edit.site, layer)][key].append(group)
        for abort, row in zip(state.bound.aborts, loaded.aborts, strict=True):
            place = (abort.condition.site, abort.condition.layer)
            self.aborts[place].append((abort.name, Asked(abort.condition, row, span, state)))

    def _place(self, place: Place) -> None:
        _, layer = place
        operators = self.operators[place]
        for stage, kind, preserve in sorted(self.edits[place], key=lambda k: (k[0], k[1].value, k[2])):
            groups = self.edits[place][(stage, kind, preserve)]
            entries, counter, counted = self._entries(groups)
            operators.append(self._edit(kind, preserve, groups, entries, layer))
            self.counters.append(counter)
            self.counted.append(counted)
        if self.gates[place]:
            operators.append(self._gate(self.gates[place]))
        if self.aborts[place]:
            operators.append(self._abort(self.aborts[place]))
        for readout_kind, reads in self.readouts[place].items():
            operators.append(self._readout(readout_kind, reads, layer))
        if self.captures[place]:
            operators.append(self._capture(self.captures[place], layer))

    def _entries(self, groups: list[Group]) -> tuple[Entries, Tensor, Tensor]:
        key = tuple(id(g) for g in groups)
        if key in self.shared:
            return self.shared[key]
        sizes = [len(g.rows) for g in groups]
        gate = None
        if any(g.gate is not None for g in groups):
            always = self.n_open
            gate = self._tensor(
                np.concatenate([np.full(len(g.rows), always) if g.gate is None else g.gate for g in groups])
            )
        rows = np.concatenate([g.rows for g in groups])
        entries = Entries(
            self._tensor(rows),
            self._tensor(np.repeat(np.arange(len(groups)), sizes)),
            self._float(np.concatenate([g.strength for g in groups])),
            gate,
            torch.ones(len(rows), device=self.device),
            self._pairs(rows),
        )
        counter = self._tensor(np.repeat([g.counter for g in groups], sizes))
        counted = self._tensor(np.concatenate([g.counted for g in groups]).astype(np.float64))
        self.shared[key] = (entries, counter, counted)
        return self.shared[key]

    def _pairs(self, rows: IntArray) -> tuple[Tensor, Tensor] | None:
        """Every entry with every earlier one at its row; entries of a row are in the order of its program."""
        order = np.argsort(rows, kind="stable")
        ordered = rows[order]
        later, earlier = [], []
        for distance in range(1, int(np.bincount(rows).max())):
            same = ordered[distance:] == ordered[:-distance]
            later.append(order[distance:][same])
            earlier.append(order[:-distance][same])
        if not later:
            return None
        return self._tensor(np.concatenate(later)), self._tensor(np.concatenate(earlier))

    def _edit(self, kind: Kind, preserve: bool, groups: list[Group], entries: Entries, layer: int) -> Operator:
        numbers = [g.numbers[layer] for g in groups]
        if kind in (Kind.NEURONS, Kind.HEADS):
            return self._units(kind, groups, entries, numbers)
        width = self.setting.widths[groups[0].edit.site]
        if kind is Kind.LOW_RANK:
            rank = max(len(n.numbers[0]) for n in numbers)
            halves = [np.split(n.rows, 2) for n in numbers]
            rotation, weight = (self._padded_rows([h[i] for h in halves], rank, width) for i in (0, 1))
            bias = np.stack([np.pad(n.numbers[0], (0, rank - len(n.numbers[0]))) for n in numbers])
            return LowRankOperator(entries, preserve, rotation, weight, self._float(bias))
        vectors = self._rows(np.concatenate([n.rows for n in numbers]), width)
        if kind is Kind.ADD:
            return AddPreservingOperator(entries, vectors, True) if preserve else AddOperator(entries, vectors)
        if kind is Kind.REPLACE:
            return ReplaceOperator(entries, vectors, preserve)
        first, second = (self._float(np.array([g.edit.bounds[i] for g in groups])) for i in (0, 1))
        if kind is Kind.PROJECT:
            return ProjectOperator(entries, vectors, preserve, first, second)
        return RotateOperator(entries, vectors, preserve, first)

    def _units(self, kind: Kind, groups: list[Group], entries: Entries, numbers: list[EditRows]) -> Operator:
        """Units of all groups: an edit's neurons or heads, repeated for each of its rows."""
        rows = [len(g.rows) for g in groups]
        sizes = np.repeat([len(n.numbers[0]) for n in numbers], rows)
        group = np.repeat(np.arange(len(sizes)), sizes)

        def each(column: list[FloatArray]) -> FloatArray:
            return np.concatenate([np.tile(values, n) for values, n in zip(column, rows, strict=True)])

        in_row = self.setting.n_heads if kind is Kind.HEADS else self.setting.widths[Site.MLP_POST]
        row = np.concatenate([g.rows for g in groups])[group]
        units = Units(
            self._tensor(row * in_row + each([n.numbers[0] for n in numbers])),
            self._tensor(group),
            self._float(np.concatenate([g.strength for g in groups])[group]),
            self._float(each([n.numbers[1] for n in numbers])),
        )
        if kind is Kind.HEADS:
            offset = self._rows(each([n.rows for n in numbers]), self.setting.head_dim)
            return HeadOperator(entries, units, self.setting.n_heads, offset)
        offset, low, high = (self._float(each([n.numbers[i] for n in numbers])) for i in (2, 3, 4))
        return NeuronOperator(entries, units, offset, low, high)

    def _condition(self, asked: list[Asked]) -> ConditionOperator:
        sizes = [len(a.span.token_ids) for a in asked]
        width = self.setting.widths[asked[0].condition.site]
        valid = [scope_mask(a.condition.scope, a.state.sequence, a.span.positions, a.span.token_ids) for a in asked]
        return ConditionOperator(
            self._tensor(np.concatenate([a.span.row + np.arange(n) for a, n in zip(asked, sizes, strict=True)])),
            self._rows(np.repeat([a.unit for a in asked], sizes), width),
            self._float(np.repeat([a.condition.sign for a in asked], sizes)),
            self._float(np.repeat([a.condition.threshold for a in asked], sizes)),
            self._tensor(np.repeat([a.condition.cosine for a in asked], sizes)),
            self._tensor(np.concatenate(valid)),
        )

    def _gate(self, gates: list[GateRows]) -> Operator:
        sizes = [len(g.asked.span.token_ids) for g in gates]
        places = np.concatenate([g.first + np.arange(n) for g, n in zip(gates, sizes, strict=True)])
        latched = self._tensor(np.repeat([g.latched for g in gates], sizes))
        latch = self._tensor(np.repeat([g.latch for g in gates], sizes))
        return GateOperator(self._condition([g.asked for g in gates]), self._tensor(places), latched, latch)

    def _abort(self, aborts: list[tuple[str, Asked]]) -> Operator:
        entries = [
            AbortHit(asked.state.uid, name, int(position))
            for name, asked in aborts
            for position in asked.span.positions
        ]
        return AbortOperator(self._condition([asked for _, asked in aborts]), entries)

    def _readout(self, kind: type, reads: list[Read], layer: int) -> ReadoutOperator:
        rows = self._tensor(np.concatenate([r.span.row + np.flatnonzero(r.mask) for r in reads]))
        owner = self._tensor(np.repeat(np.arange(len(reads)), [int(r.mask.sum()) for r in reads]))
        readings = [Reading(r.state.uid, r.readout, r.span.positions[r.mask]) for r in reads]
        if kind is ProjectionReadout:
            given = [r.vectors[layer] for r in reads]
            width = self.setting.widths[reads[0].readout.site]
            vectors = self._padded_rows(given, max(len(g) for g in given), width)
            return ProjectionOperator(layer, rows, readings, owner, vectors)
        if kind is NeuronReadout:
            return NeuronReadoutOperator(layer, rows, readings, owner)
        if kind is TopNeuronsReadout:
            return TopNeuronsOperator(layer, rows, readings)
        assert kind is LogitLensReadout
        return LogitLensOperator(layer, rows, readings, self.setting.unembed)

    def _capture(self, captures: list[tuple[CaptureSpan, ProgramSpan]], layer: int) -> Operator:
        # Up to the end of the prompt.
        wanted = [
            CaptureRows(capture.pool, slice(span.row, span.row + n), span.offset)
            for capture, span in captures
            if (n := min(len(span.token_ids), span.prompt_length - span.offset)) > 0
        ]
        return CaptureOperator(wanted, layer)

    def _tensor(self, array: FloatArray) -> Tensor:
        return torch.from_numpy(np.ascontiguousarray(array)).to(self.device)

    def _float(self, array: FloatArray) -> Tensor:
        return self._tensor(array).float()

    def _rows(self, rows: IntArray, width: int) -> Tensor:
        """Vectors [n, width] of the bank, float32: what is summed over them would overflow or round in less."""
        return self.setting.tables.bank(width).data.index_select(0, self._tensor(rows)).float()

    def _padded_rows(self, rows: list[IntArray], most: int, width: int) -> Tensor:
        """Vectors [k, most, width]; shorter lists are padded with zero vectors."""
        padded = np.stack([np.pad(r, (0, most - len(r)), constant_values=ZERO_ROW) for r in rows])
        return self._rows(padded.reshape(-1), width).view(len(rows), most, width)
