"""What programs are told of a step: which conditions ended a sequence, and the values of readouts.

Steps leave both in two buffers by row and column: `opened`, whether conditions held, and `readings`. Positions come
from the spans of the step, so that a report serves one step after the other.
"""

from dataclasses import dataclass
from functools import cached_property

import numpy as np

from patchclamp_server.interventions.bound import Joint
from patchclamp_server.interventions.kinds import READOUT_TABLES
from patchclamp_server.interventions.layout import ProgramLayout
from patchclamp_server.interventions.program import ReadoutValue
from patchclamp_server.interventions.rows import SpanRows
from patchclamp_server.interventions.spans import AbortHit, ProgramSpan, StepOutcome
from patchclamp_server.model.arrays import BoolArray, IntArray


@dataclass(frozen=True, eq=False)
class _Reading:
    """One readout at one row and layer: it has the numbers [start, end) of all that are read. With `joint` it is at all
    layers of the readout, of which `layer` is the last."""

    span: int
    offset: int
    name: str
    layer: int
    ids: tuple[int, ...]
    start: int
    end: int
    joint: Joint | None = None


class Report:
    """Finds the outcome of a step in buffers that have at least `n_columns` and `n_readings` columns. `condition_rows`
    and `reading_rows` are the rows, ascending, that each buffer needs."""

    def __init__(self, rows: SpanRows) -> None:
        layouts = rows.layouts
        self.n_columns = max((layout.n_columns for layout in layouts), default=0)
        self.n_readings = max((layout.n_readings for layout in layouts), default=0)
        has_conditions = np.array([layout.n_columns > 0 for layout in layouts], dtype=np.bool_)
        self.condition_rows = np.flatnonzero(has_conditions[rows.owner]) if self.n_columns else _NONE
        aborts = np.zeros((len(layouts), self.n_columns), dtype=np.bool_)
        for i, layout in enumerate(layouts):
            aborts[i, len(layout.gated) : layout.n_columns] = True
        has_aborts: BoolArray = np.logical_or.reduce(aborts, axis=1)
        self._aborting = np.flatnonzero(has_aborts[rows.owner]) if has_aborts.any() else _NONE
        self._aborts: BoolArray = aborts[rows.owner[self._aborting]]
        self._readings: list[_Reading] = []
        read = [self._read(rows, i) for i, layout in enumerate(layouts) if layout.readouts]
        self._rows = np.concatenate([r for r, _ in read]) if read else _NONE
        self._columns = np.concatenate([c for _, c in read]) if read else _NONE
        # Edits that take numbers from an earlier site have them at any of their rows.
        with_inputs = np.array([bool(layout.input_columns) for layout in layouts], dtype=np.bool_)
        taking = np.flatnonzero(with_inputs[rows.owner]) if with_inputs.any() else _NONE
        self.reading_rows = np.unique(np.concatenate((self._rows, taking)))
        self._owner, self._offset, self._batch_row = rows.owner, rows.offset, rows.row

    def _read(self, rows: SpanRows, span: int) -> tuple[IntArray, IntArray]:
        """Returns the row and column of every number that the readouts of a span ask for."""
        layout, (own,) = rows.layouts[span], np.nonzero(rows.owner == span)
        at, rows_read, columns_read = self._n_numbers, [_NONE], [_NONE]
        for i, readout in enumerate(layout.readouts):
            item = np.full(len(own), layout.readout_item(i))
            inside = own[rows.inside(own, item) & rows.counted[own]]
            for layer, columns in _columns(layout, i) if len(inside) else ():
                for offset in rows.offset[inside].tolist():
                    end = at + len(columns)
                    reading = _Reading(span, offset, readout.name, layer, readout.ids, at, end, readout.joint)
                    self._readings.append(reading)
                    at = end
                rows_read.append(np.repeat(inside, len(columns)))
                columns_read.append(np.tile(columns, len(inside)))
        return np.concatenate(rows_read), np.concatenate(columns_read)

    @property
    def _n_numbers(self) -> int:
        return self._readings[-1].end if self._readings else 0

    @property
    def asks_conditions(self) -> bool:
        """Whether the host needs to know which conditions held: gates only ask on the device."""
        return len(self._aborting) > 0

    @property
    def asks_readings(self) -> bool:
        return len(self._readings) > 0

    def aborts(self, outcome: StepOutcome, spans: list[ProgramSpan], opened: np.ndarray) -> None:
        """Adds the aborts that held; `opened` is [rows of the batch, columns]."""
        self._abort(outcome, spans, opened[self._batch_row[self._aborting]])

    def own_aborts(self, outcome: StepOutcome, spans: list[ProgramSpan], opened: np.ndarray) -> None:
        """Adds the aborts that held; `opened` is [condition_rows, columns]."""
        self._abort(outcome, spans, opened[np.searchsorted(self.condition_rows, self._aborting)])

    def _abort(self, outcome: StepOutcome, spans: list[ProgramSpan], opened: np.ndarray) -> None:
        held = (opened[:, : self.n_columns] != 0) & self._aborts
        if not held.any():
            return
        for i, column in np.argwhere(held).tolist():
            local = self._aborting[i]
            span = spans[self._owner[local]]
            assert span.state is not None
            layout = span.state.loaded.layout
            name = layout.bound.aborts[column - len(layout.gated)].name
            outcome.aborts.append(AbortHit(span.state.uid, name, span.offset + int(self._offset[local])))

    def readings(self, outcome: StepOutcome, spans: list[ProgramSpan], readings: np.ndarray) -> None:
        """Adds the values of readouts; `readings` is [rows of the batch, columns]."""
        self._tell(outcome, spans, readings[self._batch_row[self._rows], self._columns])

    def own_readings(self, outcome: StepOutcome, spans: list[ProgramSpan], readings: np.ndarray) -> None:
        """Adds the values of readouts; `readings` is [reading_rows, columns]."""
        self._tell(outcome, spans, readings[self._own_rows, self._columns])

    @cached_property
    def _own_rows(self) -> IntArray:
        """The row of each number among `reading_rows`."""
        places: IntArray = np.searchsorted(self.reading_rows, self._rows)
        return places

    def _tell(self, outcome: StepOutcome, spans: list[ProgramSpan], numbers: np.ndarray) -> None:
        values = numbers.tolist()
        for reading in self._readings:
            span = spans[reading.span]
            assert span.state is not None
            own, position = tuple(values[reading.start : reading.end]), span.offset + reading.offset
            if reading.joint is not None:
                own = reading.joint(own)
            value = ReadoutValue(reading.name, reading.layer, position, own, reading.ids)
            outcome.readouts.append((span.state.uid, value))


def _columns(layout: ProgramLayout, i: int) -> list[tuple[int, IntArray]]:
    """Returns the layers of the values of a readout, and the columns that each value has its numbers in."""
    readout, pick = layout.readouts[i], READOUT_TABLES[layout.readouts[i].kind].pick
    found = []
    for layer in readout.layers:
        first, n = layout.reading_columns[i, layer]
        found.append((layer, first + pick(readout, n)))
    if readout.joint is None:
        return found
    return [(readout.layers[-1], np.concatenate([columns for _, columns in found]))]


_NONE = np.empty(0, dtype=np.int64)
