"""The head readouts of a step: which rows attention is asked about, and which values each request gets."""

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from patchclamp_server.interventions.bound import BoundReadout
from patchclamp_server.interventions.program import ReadoutValue
from patchclamp_server.interventions.scopes import scope_mask
from patchclamp_server.interventions.spans import ProgramSpan
from patchclamp_server.interventions.state import ProgramState
from patchclamp_server.model.arrays import IntArray
from patchclamp_server.model.attention.peaks import Peaks


@dataclass(eq=False)
class HeadReading:
    """The rows of one readout of the sequence `uid`, at `positions` [n]. The positions move on from step to step."""

    uid: int
    readout: BoundReadout
    rows: IntArray  # [n] of the batch
    positions: list[int]


class HeadReadings:
    """The readings at the same rows of the batch, in one step or in many."""

    def __init__(self, readings: list[HeadReading], n_rows: int, n_heads: int, device: torch.device) -> None:
        self._readings = readings
        self.peaks = Peaks(_rows(readings), n_rows, n_heads, device)
        # This holds the peaks asked last, and where the values of each reading are in them.
        self._index: tuple[Peaks, Tensor] | None = None

    def move(self, spans: Sequence[ProgramSpan]) -> None:
        """Moves every reading to the next token of its sequence, which is at the same row."""
        positions = {span.state.uid: span.offset for span in spans if span.state is not None}
        for reading in self._readings:
            reading.positions = [positions[reading.uid]]

    def values(self, peaks: Peaks | None = None) -> list[tuple[int, ReadoutValue]]:
        """Returns (uid, value) of every row and layer asked for. `peaks`: those to read from, which may hold more than
        was asked for; its own by default."""
        peaks = peaks or self.peaks
        n_heads = peaks.positions.shape[2]
        if self._index is None or self._index[0] is not peaks:
            self._index = peaks, self._places(peaks)
        wanted = self._index[1]
        positions = peaks.positions.view(-1, n_heads).index_select(0, wanted).tolist()
        probabilities = peaks.probabilities.view(-1, n_heads).index_select(0, wanted).tolist()
        every = tuple(range(n_heads))
        found = []
        at = 0
        for reading in self._readings:
            readout = reading.readout
            for layer in readout.layers:
                heads = readout.heads[layer]
                for position in reading.positions:
                    ids, values = positions[at], probabilities[at]
                    if heads != every:
                        ids, values = [ids[h] for h in heads], [values[h] for h in heads]
                    found.append((reading.uid, ReadoutValue(readout.name, layer, position, tuple(values), tuple(ids))))
                    at += 1
        return found

    def _places(self, peaks: Peaks) -> Tensor:
        """Returns the rows of the flattened peaks, reading by reading and layer by layer."""
        n_rows = peaks.positions.shape[1]
        parts = [peaks.layers[layer].place * n_rows + r.rows for r in self._readings for layer in r.readout.layers]
        return torch.from_numpy(np.concatenate(parts)).to(peaks.positions.device)


class HeadReader:
    """Keeps the last readings: decode steps that read the same rows only move them on."""

    def __init__(self, n_heads: int, device: torch.device) -> None:
        self._n_heads = n_heads
        self._device = device
        # The key is the number of rows, and the row and sequence of each program.
        self._key: tuple[object, ...] | None = None
        self._last: HeadReadings | None = None

    def read(self, spans: Sequence[ProgramSpan], n_rows: int) -> HeadReadings | None:
        """Returns the readings of the step's spans that have a program, or None when no row is read."""
        reading = [span for span in spans if span.state is not None and span.state.bound.head_readouts]
        if not reading:
            return None
        key = None
        if all(_steady(span) for span in reading):
            key = (n_rows, *((span.row, span.state.uid) for span in reading if span.state is not None))
            if key == self._key:
                if self._last is not None:
                    self._last.move(reading)
                return self._last
        found = [one for span in reading if span.state is not None for one in _readings(span, span.state)]
        self._key = key
        self._last = HeadReadings(found, n_rows, self._n_heads, self._device) if found else None
        return self._last


def _steady(span: ProgramSpan) -> bool:
    """Whether the next token of the sequence is read as this one is: it is a new generated token, and scopes are
    settled."""
    state = span.state
    assert state is not None
    if len(span.token_ids) != 1 or span.offset < max(span.prompt_length, state.counted):
        return False
    return state.heads_settled


def _readings(span: ProgramSpan, state: ProgramState) -> list[HeadReading]:
    positions = span.positions
    fresh = positions >= state.counted
    found = []
    for readout in state.bound.head_readouts:
        inside = scope_mask(readout.scope, state.sequence, positions, span.token_ids) & fresh
        if inside.any():
            rows = span.row + np.flatnonzero(inside)
            found.append(HeadReading(state.uid, readout, rows, positions[inside].tolist()))
    return found


def _rows(readings: list[HeadReading]) -> dict[int, IntArray]:
    """Returns the rows read at each layer, ascending."""
    parts: dict[int, list[IntArray]] = defaultdict(list)
    for reading in readings:
        for layer in reading.readout.layers:
            parts[layer].append(reading.rows)
    return {layer: np.unique(np.concatenate(parts[layer])) for layer in sorted(parts)}
