"""What a step tells the kernels of its programs, and how what they wrote is read."""

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
from torch import Tensor

from patchclamp_kernels.program_table import EntryKind
from patchclamp_server.interventions.bound import BoundEdit, BoundReadout
from patchclamp_server.interventions.compiler import Compiler, Setting
from patchclamp_server.interventions.layout import WORD, ProgramLayout, distinct
from patchclamp_server.interventions.observers import AbortHit
from patchclamp_server.interventions.plan import ProgramSpan, StepOutcome, StepPlan
from patchclamp_server.interventions.program import NeuronReadout, ReadoutValue
from patchclamp_server.interventions.slots import SlotTables
from patchclamp_server.model.arrays import BoolArray, IntArray
from patchclamp_server.model.sites import FORWARD_ORDER, Site, place_number

# What the activation kernel does by itself; anything else at the neurons is done on whole rows.
_ACTIVATION_KINDS = {EntryKind.NEURONS, EntryKind.NEURON_VALUES}
NO_PROGRAM = -1


@dataclass(eq=False)
class KernelPlan:
    """Arrays over the T rows of a step, and over its S programs.

    `attn_q`, `attn_z`, `neurons`, `neuron_rows`: whether there are entries at the queries, at the heads, at the
    neurons, and entries at the neurons that need whole rows. `breaks`: places after which a launch must end, because
    something looks at the activation there or a latch must be settled.
    """

    slot: IntArray  # [T]
    mask: IntArray  # [T, words]
    counted: IntArray  # [T]
    spans: IntArray  # [S, 2]
    counters: IntArray  # [S, items]
    programs: list[tuple[ProgramSpan, ProgramLayout]]
    n_columns: int = 0
    n_readings: int = 0
    attn_q: bool = False
    attn_z: bool = False
    neurons: bool = False
    neuron_rows: bool = False
    most_neuron_entries: int = 0
    breaks: set[int] = field(default_factory=set)
    # Those of `breaks` that settle latches.
    latches: set[int] = field(default_factory=set)
    observers: StepPlan | None = None

    @property
    def words(self) -> int:
        return int(self.mask.shape[1])

    @property
    def n_items(self) -> int:
        return int(self.counters.shape[1])

    def outcome(self, opened: Tensor, readings: Tensor) -> StepOutcome:
        """`opened` [T, columns] and `readings` [T, columns] as the step left them: copied where somebody asked."""
        outcome = self.observers.finish() if self.observers is not None else StepOutcome()
        aborting = [(span, layout) for span, layout in self.programs if layout.bound.aborts]
        reading = [(span, layout) for span, layout in self.programs if layout.readouts]
        if aborting:
            held = opened.cpu().numpy()
            for span, layout in aborting:
                outcome.aborts += _aborts(span, layout, held[span.rows])
        if reading:
            values = readings.cpu().numpy()
            for span, layout in reading:
                outcome.readouts += _readings(span, layout, values[span.rows])
        return outcome


def _aborts(span: ProgramSpan, layout: ProgramLayout, opened: np.ndarray) -> list[AbortHit]:
    assert span.state is not None
    hits = []
    for i, abort in enumerate(layout.bound.aborts):
        for place in np.flatnonzero(opened[:, layout.abort_column(i)]).tolist():
            hits.append(AbortHit(span.state.uid, abort.name, span.offset + place))
    return hits


def _readings(span: ProgramSpan, layout: ProgramLayout, readings: np.ndarray) -> list[tuple[int, ReadoutValue]]:
    state = span.state
    assert state is not None
    positions = span.positions
    masks = layout.masks(state.sequence, positions, span.token_ids)
    found = []
    for i, readout in enumerate(layout.readouts):
        inside = _bit(masks, layout.readout_item(i)) & (positions >= state.counted)
        for layer in readout.layers:
            first, n = layout.reading_columns[i, layer]
            for row in np.flatnonzero(inside).tolist():
                values = readings[row, first : first + n]
                found.append((state.uid, _value(readout, layer, int(positions[row]), values)))
    return found


def _value(readout: BoundReadout, layer: int, position: int, values: np.ndarray) -> ReadoutValue:
    if readout.kind is NeuronReadout:
        # Kernels read each neuron once, in ascending order.
        values = values[np.searchsorted(np.array(distinct(readout)), np.array(readout.ids))]
    return ReadoutValue(readout.name, layer, position, tuple(values.tolist()), readout.ids)


def _bit(masks: IntArray, item: int) -> BoolArray:
    inside: BoolArray = (masks[:, item // WORD] >> (item % WORD)) & 1 != 0
    return inside


def empty_plan(
    rows: int, words: int = 1, items: int = 1, programs: Sequence[tuple[ProgramSpan, ProgramLayout]] = ()
) -> KernelPlan:
    """No row has a program yet."""
    return KernelPlan(
        slot=np.full(rows, NO_PROGRAM, dtype=np.int32),
        mask=np.zeros((rows, words), dtype=np.int64),
        counted=np.zeros(rows, dtype=np.int32),
        spans=np.zeros((len(programs), 2), dtype=np.int32),
        counters=np.full((len(programs), items), -1, dtype=np.int32),
        programs=list(programs),
    )


class KernelPlanner:
    """Plans of steps. A decode step whose programs and rows are those of the step before keeps its plan."""

    def __init__(self, setting: Setting, tables: SlotTables) -> None:
        self._setting = setting
        self._tables = tables
        self._key: tuple[object, ...] | None = None
        self._plan: KernelPlan | None = None

    def plan(self, spans: list[ProgramSpan], rows: int) -> KernelPlan:
        """`spans`: those of the step that have a program or a capture."""
        key = None
        if all(_steady(span) for span in spans):
            key = (rows, *((s.row, s.state.uid, s.state.version) for s in spans if s.state is not None))
            if key == self._key and self._plan is not None:
                layouts = [layout for _, layout in self._plan.programs]
                self._plan.programs = list(zip(spans, layouts, strict=True))
                self._observe(self._plan, spans)
                return self._plan
        plan = self._made(spans, rows)
        self._key, self._plan = key, plan
        return plan

    def _made(self, spans: list[ProgramSpan], rows: int) -> KernelPlan:
        programs = [(s, self._tables.written(s.state).layout) for s in spans if s.state is not None]
        words = max((layout.words for _, layout in programs), default=1)
        items = max((len(layout.bound.edits) for _, layout in programs), default=0) or 1
        plan = empty_plan(rows, words, items, programs)
        for i, (span, layout) in enumerate(programs):
            self._add(plan, i, span, layout)
        self._observe(plan, spans)
        return plan

    def _add(self, plan: KernelPlan, i: int, span: ProgramSpan, layout: ProgramLayout) -> None:
        state = span.state
        assert state is not None
        positions, n = span.positions, len(span.token_ids)
        own = span.rows
        plan.slot[own] = self._tables.slots(state, positions)
        plan.mask[own, : layout.words] = layout.masks(state.sequence, positions, span.token_ids)
        plan.counted[own] = positions >= state.counted
        plan.spans[i] = span.row, n
        plan.counters[i, : len(layout.bound.edits)] = state.loaded.counters
        plan.n_columns = max(plan.n_columns, layout.n_columns)
        plan.n_readings = max(plan.n_readings, layout.n_readings)
        for place, kinds in self._tables.written(state).kinds.items():
            site = FORWARD_ORDER[place % len(FORWARD_ORDER)]
            if site is Site.ATTN_Q:
                plan.attn_q = True
            elif site is Site.ATTN_Z:
                plan.attn_z = True
            elif site is Site.MLP_POST:
                plan.neurons = True
                plan.neuron_rows |= bool(kinds.keys() - _ACTIVATION_KINDS)
                plan.most_neuron_entries = max(plan.most_neuron_entries, kinds.total())
        if n > 1:
            # Rows of one launch run at once: a latch must be settled in an earlier one.
            for edit in layout.bound.edits:
                plan.latches |= _latch_break(edit)

    def _observe(self, plan: KernelPlan, spans: list[ProgramSpan]) -> None:
        """The observers of this step, and the launches that must end for them. Often there are none in scope."""
        plan.observers, plan.breaks = None, set(plan.latches)
        if any(layout.observed for _, layout in plan.programs) or any(s.capture is not None for s in spans):
            observers = Compiler(self._setting, spans, only_observers=True).compile()
            if observers.operators:
                plan.observers = observers
                plan.breaks |= {place_number(site, layer) for site, layer in observers.operators}


def _latch_break(edit: BoundEdit) -> set[int]:
    if edit.gate is None or not edit.latched:
        return set()
    return {place_number(edit.gate.site, edit.gate.layer)}


def _steady(span: ProgramSpan) -> bool:
    """Whether the next token of the sequence finds the same rows: a new generated token, and settled scopes."""
    if span.capture is not None or len(span.token_ids) != 1 or span.offset < span.prompt_length:
        return False
    return span.state is None or (span.state.settled and span.offset >= span.state.counted)
