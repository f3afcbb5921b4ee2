"""What a step tells the kernels of its programs, and how what they wrote is read."""

from dataclasses import dataclass, field

import numpy as np
from torch import Tensor

from patchclamp_server.interventions.bound import BoundEdit
from patchclamp_server.interventions.entries import Launches
from patchclamp_server.interventions.plan import Part, StepPlan
from patchclamp_server.interventions.planner import Planner
from patchclamp_server.interventions.scopes import Int32Array
from patchclamp_server.interventions.setting import Setting
from patchclamp_server.interventions.spans import ProgramSpan, StepOutcome
from patchclamp_server.model.arrays import IntArray
from patchclamp_server.model.sites import place_number

NO_PROGRAM = -1


@dataclass(eq=False)
class KernelPlan:
    """Arrays over the T rows of a step, and over its S programs.

    `attn_q`, `attn_z`, `neurons`, `neuron_rows`, `preactivations`: whether there are entries at the queries, at the
    heads, at the neurons, entries at the neurons that need whole rows, and entries at gates or ups. `breaks`: places
    after which a launch must end, because something looks at the activation there or a latch must be settled.
    """

    slot: IntArray  # [T]
    mask: IntArray  # [T, words]
    counted: IntArray  # [T]
    spans: IntArray  # [S, 2]
    counters: IntArray  # [S, items]
    parts: tuple[Part, ...] = ()
    n_columns: int = 0
    n_readings: int = 0
    attn_q: bool = False
    attn_z: bool = False
    neurons: bool = False
    neuron_rows: bool = False
    preactivations: bool = False
    most_neuron_entries: int = 0
    breaks: set[int] = field(default_factory=set)
    # What torch runs between the kernels, where there is any.
    observers: StepPlan | None = None

    @property
    def words(self) -> int:
        return int(self.mask.shape[1])

    @property
    def n_items(self) -> int:
        return int(self.counters.shape[1])

    def outcome(self, opened: Tensor, readings: Tensor, end: Tensor | None = None) -> StepOutcome:
        """`opened` [T, columns], `readings` [T, columns] and the residual stream `end` [T, d_model], which only
        observers need, as the step left them: copied where somebody asked."""
        outcome = StepOutcome()
        if self.observers is not None:
            assert end is not None
            outcome = self.observers.finish(end)
        if any(part.report.asks_conditions for part in self.parts):
            held = opened.cpu().numpy()
            for part in self.parts:
                part.report.aborts(outcome, part.spans, held)
        if any(part.report.asks_readings for part in self.parts):
            values = readings.cpu().numpy()
            for part in self.parts:
                part.report.readings(outcome, part.spans, values)
        return outcome


def empty_plan(rows: int, words: int = 1, items: int = 1, programs: int = 0) -> KernelPlan:
    """No row has a program yet."""
    return KernelPlan(
        slot=np.full(rows, NO_PROGRAM, dtype=np.int32),
        mask=np.zeros((rows, words), dtype=np.int64),
        counted=np.zeros(rows, dtype=np.int32),
        spans=np.zeros((programs, 2), dtype=np.int32),
        counters=np.full((programs, items), -1, dtype=np.int32),
    )


@dataclass(frozen=True, eq=False)
class _PartArrays:
    """A part as the kernels take it. It is made once for a part that is kept."""

    part: Part
    spans: Int32Array  # [S, 2]
    counters: Int32Array  # [S, items]
    launches: Launches
    # Places that settle latches.
    latches: frozenset[int]

    @classmethod
    def of(cls, part: Part) -> "_PartArrays":
        states, launches, latches = part.rows.states, Launches(), set[int]()
        items = max((len(state.bound.edits) for state in states), default=0) or 1
        spans = np.zeros((len(states), 2), dtype=np.int32)
        counters = np.full((len(states), items), -1, dtype=np.int32)
        for i, (span, state) in enumerate(zip(part.spans, states, strict=True)):
            spans[i] = span.row, len(span.token_ids)
            counters[i, : len(state.bound.edits)] = state.loaded.counters
            launches |= state.loaded.written.launches
            if len(span.token_ids) > 1:
                # Rows of one launch run at once: a latch must be settled in an earlier one.
                latches.update(place for edit in state.bound.edits for place in _latch_places(edit))
        return cls(part, spans, counters, launches, frozenset(latches))


class KernelPlanner:
    """Plans of steps. A decode step whose programs and rows are those of the step before keeps its plan."""

    def __init__(self, setting: Setting) -> None:
        self._planner = Planner(setting, by_kernels=True)
        # Those of the last step, and its plan.
        self._arrays: list[_PartArrays] = []
        self._last: tuple[StepPlan, int, KernelPlan] | None = None

    @property
    def compilations(self) -> int:
        return self._planner.compilations

    def plan(self, spans: list[ProgramSpan], rows: int) -> KernelPlan:
        """`spans`: those of the step that have a program or captures."""
        parts = self._planner.plan(spans)
        if self._last is None or self._last[0] is not parts or self._last[1] != rows:
            self._last = (parts, rows, self._made(parts, rows))
        return self._last[2]

    def _made(self, parts: StepPlan, rows: int) -> KernelPlan:
        kept = {id(arrays.part): arrays for arrays in self._arrays}
        self._arrays = [kept.get(id(part)) or _PartArrays.of(part) for part in parts.parts]
        words = max((part.rows.mask.shape[1] for part in parts.parts), default=1)
        items = max((arrays.counters.shape[1] for arrays in self._arrays), default=1)
        plan = empty_plan(rows, words, items, sum(len(arrays.spans) for arrays in self._arrays))
        plan.parts, launches, at = tuple(parts.parts), Launches(), 0
        for arrays in self._arrays:
            own, report = arrays.part.rows, arrays.part.report
            plan.slot[own.row] = own.slot
            plan.mask[own.row, : own.mask.shape[1]] = own.mask
            plan.counted[own.row] = own.counted
            programs = slice(at, at + len(arrays.spans))
            plan.spans[programs] = arrays.spans
            plan.counters[programs, : arrays.counters.shape[1]] = arrays.counters
            at = programs.stop
            plan.n_columns = max(plan.n_columns, report.n_columns)
            plan.n_readings = max(plan.n_readings, report.n_readings)
            launches |= arrays.launches
            plan.breaks |= arrays.latches
        plan.attn_q, plan.attn_z = launches.attn_q, launches.attn_z
        plan.neurons, plan.neuron_rows = launches.neurons, launches.neuron_rows
        plan.preactivations = launches.preactivations
        plan.most_neuron_entries = launches.most_neuron_entries
        observed = parts.operators
        if observed:
            plan.observers = parts
            plan.breaks |= {place_number(site, layer) for site, layer in observed}
        return plan


def _latch_places(edit: BoundEdit) -> set[int]:
    if edit.gate is None or not edit.latched:
        return set()
    return {place_number(edit.gate.site, edit.gate.layer)}
