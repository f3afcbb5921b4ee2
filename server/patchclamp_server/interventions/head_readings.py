"""The head readouts of one step: which rows attention is asked about, and the values for each request."""

from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import torch

from patchclamp_server.engine.peaks import Peaks
from patchclamp_server.interventions.bound import BoundReadout
from patchclamp_server.interventions.plan import ProgramSpan
from patchclamp_server.interventions.program import ReadoutValue
from patchclamp_server.interventions.scopes import IntArray, scope_mask


@dataclass(frozen=True, eq=False)
class HeadReading:
    """Rows of one readout of one sequence: `uid` says whose, `positions` [n] where."""

    uid: int
    readout: BoundReadout
    rows: IntArray  # [n] of the batch
    positions: IntArray  # [n]


class HeadReadings:
    """Made anew in every step, since positions move on."""

    def __init__(self, readings: list[HeadReading]) -> None:
        self._readings = readings

    @classmethod
    def of(cls, spans: Iterable[ProgramSpan]) -> "HeadReadings | None":
        """None when no row of the step is read."""
        readings = []
        for span in spans:
            state = span.state
            if state is None or not state.bound.head_readouts:
                continue
            positions = span.positions
            fresh = positions >= state.counted
            for readout in state.bound.head_readouts:
                inside = scope_mask(readout.scope, state.sequence, positions, span.token_ids) & fresh
                if inside.any():
                    rows = span.row + np.flatnonzero(inside)
                    readings.append(HeadReading(state.uid, readout, rows, positions[inside]))
        return cls(readings) if readings else None

    def peaks(self, n_rows: int, n_heads: int, device: torch.device) -> Peaks:
        """Memory for what attention is asked in a step of `n_rows`."""
        return Peaks.of(self._rows(), n_rows, n_heads, device)

    def _rows(self) -> dict[int, IntArray]:
        """Rows that are read at each layer, ascending."""
        parts: dict[int, list[IntArray]] = defaultdict(list)
        for reading in self._readings:
            for layer in reading.readout.layers:
                parts[layer].append(reading.rows)
        # Most layers are read at the same rows.
        merged: dict[tuple[int, ...], IntArray] = {}
        rows = {}
        for layer in sorted(parts):
            key = tuple(map(id, parts[layer]))
            if key not in merged:
                several = len(parts[layer]) > 1
                merged[key] = np.unique(np.concatenate(parts[layer])) if several else parts[layer][0]
            rows[layer] = merged[key]
        return rows

    def values(self, peaks: Peaks) -> list[tuple[int, ReadoutValue]]:
        """(uid, value) of every row and layer that was asked for."""
        n_rows, n_heads = peaks.positions.shape[1:]
        index = np.concatenate([_index(reading, peaks, n_rows) for reading in self._readings])
        wanted = torch.from_numpy(index).to(peaks.positions.device)
        positions = peaks.positions.view(-1, n_heads).index_select(0, wanted).tolist()
        probabilities = peaks.probabilities.view(-1, n_heads).index_select(0, wanted).tolist()
        found = []
        at = 0
        for reading in self._readings:
            readout = reading.readout
            for layer in readout.layers:
                heads = readout.heads[layer]
                every = len(heads) == n_heads and heads == tuple(range(n_heads))
                for position in reading.positions.tolist():
                    ids, values = positions[at], probabilities[at]
                    if not every:
                        ids, values = [ids[h] for h in heads], [values[h] for h in heads]
                    found.append((reading.uid, ReadoutValue(readout.name, layer, position, tuple(values), tuple(ids))))
                    at += 1
        return found


def _index(reading: HeadReading, peaks: Peaks, n_rows: int) -> IntArray:
    """Places in the flat peaks, layer by layer."""
    layers = np.array([peaks.layers[layer] for layer in reading.readout.layers], dtype=np.int64)
    index: IntArray = (layers[:, None] * n_rows + reading.rows).reshape(-1)
    return index
