"""Compiles the programs of one step into operators at sites, and runs them.

Which operators exist depends on the (site, layer, kind of edit) combinations in use, never on how many programs use
them; programs are entries in index tensors. A decode step whose programs and rows are those of the step before reuses
its plan as it is.
"""

from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from patchclamp_server.engine.request import Pooling
from patchclamp_server.interventions.bind import BoundCondition, BoundEdit, BoundReadout, Kind
from patchclamp_server.interventions.observers import (
    AbortHit,
    AbortOperator,
    CaptureOperator,
    CaptureState,
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
    StepContext,
)
from patchclamp_server.interventions.program import (
    FORWARD_ORDER,
    LogitLensReadout,
    NeuronReadout,
    ProjectionReadout,
    ReadoutValue,
    Site,
    TopNeuronsReadout,
)
from patchclamp_server.interventions.scopes import BoolArray, IntArray, scope_mask
from patchclamp_server.interventions.state import ProgramState
from patchclamp_server.interventions.tables import Tables

Place = tuple[Site, int]


@dataclass(frozen=True, eq=False)
class CaptureSpan:
    state: CaptureState
    site: Site
    pooling: Pooling


@dataclass(frozen=True, eq=False)
class ProgramSpan:
    """Rows [row, row + n) of the batch are tokens of one sequence from position `offset` on."""

    state: ProgramState | None
    row: int
    offset: int
    token_ids: IntArray  # [n]
    prompt_length: int
    capture: CaptureSpan | None = None

    @property
    def positions(self) -> IntArray:
        return np.arange(self.offset, self.offset + len(self.token_ids), dtype=np.int64)

    @property
    def reusable(self) -> bool:
        """One generated token whose scopes have settled."""
        settled = self.state is None or self.state.settled
        return settled and len(self.token_ids) == 1 and self.offset >= self.prompt_length


@dataclass(frozen=True, eq=False)
class _Group:
    """One edit of one sequence in this step."""

    edit: BoundEdit
    rows: IntArray  # [n] rows of the batch in scope
    strength: np.ndarray  # [n]
    gate: IntArray | None  # [n] entries of StepContext.open
    counter: int
    counted: BoolArray  # [n]


@dataclass(eq=False)
class StepOutcome:
    aborts: list[AbortHit] = field(default_factory=list)
    readouts: list[tuple[int, ReadoutValue]] = field(default_factory=list)


class StepPlan:
    """Operators of one step by place. Implements the decoder's SiteHooks."""

    def __init__(
        self, operators: dict[Place, list[Operator]], counter: Tensor, counted: Tensor, n_open: int, tables: Tables
    ) -> None:
        self.operators = operators
        self.counter = counter  # [groups] row of Tables.counts, in the order of execution
        self.counted = counted  # [groups] 0 or 1
        self.n_open = n_open
        self.tables = tables
        every = [op for ops in operators.values() for op in ops]
        self._readouts = [op for op in every if isinstance(op, ReadoutOperator)]
        self._aborts = [op for op in every if isinstance(op, AbortOperator)]
        self._context: StepContext | None = None

    def begin(self, positions: Tensor, dtype: torch.dtype) -> None:
        opened = torch.zeros(self.n_open + 1, dtype=dtype, device=positions.device)
        opened[-1] = 1.0
        self._context = StepContext(positions, self.tables.latch, opened, [], [], [])

    def visit(self, site: Site, layer: int, x: Tensor) -> None:
        for operator in self.operators.get((site, layer), ()):
            assert self._context is not None
            operator.run(x, self._context)

    def finish(self) -> StepOutcome:
        """Adds the step to the receipts, and brings what was read to the host."""
        context = self._context
        assert context is not None
        if context.norms:
            opened = torch.cat(context.opened).double() * self.counted
            norms = torch.cat(context.norms).double().clamp_min(torch.finfo(torch.float32).tiny)
            change = torch.cat(context.delta_norms).double() / norms
            self.tables.counts.index_add_(0, self.counter, torch.stack((opened, opened * change), dim=1))
        outcome = StepOutcome()
        for abort in self._aborts:
            outcome.aborts += abort.results()
        for readout in self._readouts:
            outcome.readouts += readout.results()
        return outcome


class Planner:
    """Makes the plan of each step; keeps the last one while nothing changes."""

    def __init__(
        self,
        tables: Tables,
        *,
        n_heads: int,
        d_ff: int,
        dtype: torch.dtype,
        device: torch.device,
        unembed: Callable[[Tensor], Tensor],
    ) -> None:
        self.tables = tables
        self.n_heads = n_heads
        self.d_ff = d_ff
        self.dtype = dtype
        self.device = device
        self.unembed = unembed
        self._key: tuple[tuple[int, int, int], ...] | None = None
        self._plan: StepPlan | None = None

    def plan(self, spans: list[ProgramSpan]) -> StepPlan:
        """`spans`: those of the step that have a program or a capture."""
        key = None
        if all(span.reusable and span.capture is None for span in spans):
            key = tuple((s.row, s.state.uid, s.state.version) for s in spans if s.state is not None)
        readouts = any(s.state is not None and (s.state.bound.readouts or s.state.bound.aborts) for s in spans)
        if key is not None and not readouts and key == self._key and self._plan is not None:
            return self._plan
        plan = _Compiler(self, spans).compile()
        # Readouts name positions, which move on; their plans are made anew.
        self._key, self._plan = (None, None) if readouts else (key, plan)
        return plan


class _Compiler:
    def __init__(self, planner: Planner, spans: list[ProgramSpan]) -> None:
        self.planner = planner
        self.spans = spans
        self.device = planner.device
        # Edit groups by place and (stage, kind, preserve_norm).
        self.edits: dict[Place, dict[tuple[int, Kind, bool], list[_Group]]] = defaultdict(lambda: defaultdict(list))
        self.gates: dict[Place, list[tuple[BoundEdit, ProgramSpan, int, int]]] = defaultdict(list)
        self.aborts: dict[Place, list[tuple[str, BoundCondition, ProgramSpan]]] = defaultdict(list)
        self.readouts: dict[Place, dict[type, list[tuple[BoundReadout, ProgramSpan, BoolArray]]]] = defaultdict(
            lambda: defaultdict(list)
        )
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
                for layer in span.capture.state.layers:
                    self.captures[(span.capture.site, layer)].append((span.capture, span))
        places = {*self.edits, *self.gates, *self.aborts, *self.readouts, *self.captures}
        for place in sorted(places, key=lambda p: (p[1], FORWARD_ORDER.index(p[0]))):
            self._place(place)
        none = torch.empty(0, dtype=torch.int64, device=self.device)
        counter = torch.cat(self.counters) if self.counters else none
        counted = torch.cat(self.counted) if self.counted else none.double()
        return StepPlan(dict(self.operators), counter, counted, self.n_open, self.planner.tables)

    def _collect(self, span: ProgramSpan, state: ProgramState) -> None:
        positions = span.positions
        counted = positions >= state.counted
        for i, edit in enumerate(state.bound.edits):
            first_open = self.n_open
            if edit.gate is not None:
                # A latch looks at every row, also where the edit itself is out of scope.
                self.gates[(edit.gate.site, edit.gate.layer)].append((edit, span, first_open, state.latches[i]))
                self.n_open += len(positions)
            mask = state.edit_mask(edit, positions, span.token_ids)
            if not mask.any():
                continue
            local = np.flatnonzero(mask)
            group = _Group(
                edit,
                span.row + local,
                state.strength_at(i, positions[local]),
                first_open + local if edit.gate is not None else None,
                state.counters[i],
                counted[local],
            )
            for layer in edit.layers:
                key = (state.stages[i][layer], edit.kind, edit.preserve_norm)
                self.edits[(edit.site, layer)][key].append(group)
        for abort in state.bound.aborts:
            place = (abort.condition.site, abort.condition.layer)
            self.aborts[place].append((abort.name, abort.condition, span))
        for readout in state.bound.readouts:
            mask = scope_mask(readout.scope, state.sequence, positions, span.token_ids) & counted
            if mask.any():
                for layer in readout.layers:
                    self.readouts[(readout.site, layer)][readout.kind].append((readout, span, mask))

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
        for readout_kind, asked in self.readouts[place].items():
            operators.append(self._readout(readout_kind, asked, layer))
        if self.captures[place]:
            operators.append(self._capture(self.captures[place], layer))

    def _entries(self, groups: list[_Group]) -> tuple[Entries, Tensor, Tensor]:
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
        rows = self._tensor(np.concatenate([g.rows for g in groups]))
        entries = Entries(
            rows,
            self._tensor(np.repeat(np.arange(len(groups)), sizes)),
            self._tensor(np.concatenate([g.strength for g in groups])).to(self.planner.dtype),
            gate,
            torch.ones(len(rows), dtype=self.planner.dtype, device=self.device),
        )
        counter = self._tensor(np.repeat([g.counter for g in groups], sizes))
        counted = self._tensor(np.concatenate([g.counted for g in groups]).astype(np.float64))
        self.shared[key] = (entries, counter, counted)
        return self.shared[key]

    def _edit(self, kind: Kind, preserve: bool, groups: list[_Group], entries: Entries, layer: int) -> Operator:
        payload = [tuple(self._float(t) for t in g.edit.payload[layer]) for g in groups]
        if kind is Kind.LOW_RANK:
            return LowRankOperator(entries, preserve, payload)
        if kind in (Kind.NEURONS, Kind.HEADS):
            index = [p[0] for p in payload]
            sizes = np.array([len(i) for i in index])
            spread = self._tensor(np.repeat(np.arange(len(entries.rows)), sizes[entries.edit.cpu().numpy()]))
            parameters = [p[1:] for p in payload]
            if kind is Kind.HEADS:
                return HeadOperator(entries, self.planner.n_heads, index, parameters, spread)
            return NeuronOperator(entries, self.planner.d_ff, index, parameters, spread)
        vectors = torch.stack([p[0] for p in payload])
        if kind is Kind.ADD:
            return AddPreservingOperator(entries, vectors, True) if preserve else AddOperator(entries, vectors)
        if kind is Kind.REPLACE:
            return ReplaceOperator(entries, vectors, preserve)
        first, second = (self._float(torch.tensor([g.edit.bounds[i] for g in groups])) for i in (0, 1))
        if kind is Kind.PROJECT:
            return ProjectOperator(entries, vectors, preserve, first, second)
        return RotateOperator(entries, vectors, preserve, first)

    def _condition(self, conditions: list[tuple[BoundCondition, ProgramSpan]]) -> ConditionOperator:
        rows, units, sign, threshold, cosine, valid = [], [], [], [], [], []
        for condition, span in conditions:
            assert span.state is not None
            n = len(span.token_ids)
            rows.append(np.arange(span.row, span.row + n))
            units.append(self._float(condition.unit).expand(n, -1))
            sign += [condition.sign] * n
            threshold += [condition.threshold] * n
            cosine += [condition.cosine] * n
            valid.append(scope_mask(condition.scope, span.state.sequence, span.positions, span.token_ids))
        return ConditionOperator(
            self._tensor(np.concatenate(rows)),
            torch.cat(units),
            self._float(torch.tensor(sign)),
            self._float(torch.tensor(threshold)),
            torch.tensor(cosine, device=self.device),
            self._tensor(np.concatenate(valid)),
        )

    def _gate(self, gates: list[tuple[BoundEdit, ProgramSpan, int, int]]) -> Operator:
        conditions = [(edit.gate, span) for edit, span, _, _ in gates if edit.gate is not None]
        sizes = [len(span.token_ids) for _, span, _, _ in gates]
        places = np.concatenate([np.arange(first, first + n) for (_, _, first, _), n in zip(gates, sizes, strict=True)])
        latched = self._tensor(np.repeat([edit.latched for edit, _, _, _ in gates], sizes))
        latch = self._tensor(np.repeat([row for _, _, _, row in gates], sizes))
        return GateOperator(self._condition(conditions), self._tensor(places), latched, latch)

    def _abort(self, aborts: list[tuple[str, BoundCondition, ProgramSpan]]) -> Operator:
        entries = [
            AbortHit(span.state.uid, name, int(position))
            for name, _, span in aborts
            if span.state is not None
            for position in span.positions
        ]
        return AbortOperator(self._condition([(condition, span) for _, condition, span in aborts]), entries)

    def _readout(
        self, kind: type, asked: list[tuple[BoundReadout, ProgramSpan, BoolArray]], layer: int
    ) -> ReadoutOperator:
        rows = self._tensor(np.concatenate([span.row + np.flatnonzero(mask) for _, span, mask in asked]))
        owner = self._tensor(np.repeat(np.arange(len(asked)), [int(mask.sum()) for _, _, mask in asked]))
        readings = [
            Reading(span.state.uid, readout, span.positions[mask])
            for readout, span, mask in asked
            if span.state is not None
        ]
        if kind is ProjectionReadout:
            return ProjectionOperator(layer, rows, readings, owner)
        if kind is NeuronReadout:
            return NeuronReadoutOperator(layer, rows, readings, owner)
        if kind is TopNeuronsReadout:
            return TopNeuronsOperator(layer, rows, readings)
        assert kind is LogitLensReadout
        return LogitLensOperator(layer, rows, readings, self.planner.unembed)

    def _capture(self, captures: list[tuple[CaptureSpan, ProgramSpan]], layer: int) -> Operator:
        rows, owner, weight = [], [], []
        for i, (capture, span) in enumerate(captures):
            last = span.prompt_length - 1
            positions = span.positions
            wanted = positions == last if capture.pooling is Pooling.LAST_TOKEN else positions <= last
            rows.append(span.row + np.flatnonzero(wanted))
            owner.append(np.full(int(wanted.sum()), i))
            each = 1.0 if capture.pooling is Pooling.LAST_TOKEN else 1.0 / span.prompt_length
            weight.append(np.full(int(wanted.sum()), each))
        return CaptureOperator(
            self._tensor(np.concatenate(rows)),
            self._tensor(np.concatenate(owner)),
            self._float(torch.from_numpy(np.concatenate(weight))),
            [capture.state for capture, _ in captures],
            layer,
        )

    def _tensor(self, array: np.ndarray) -> Tensor:
        return torch.from_numpy(np.ascontiguousarray(array)).to(self.device)

    def _float(self, tensor: Tensor) -> Tensor:
        dtype = self.planner.dtype if tensor.is_floating_point() else tensor.dtype
        return tensor.to(device=self.device, dtype=dtype)
