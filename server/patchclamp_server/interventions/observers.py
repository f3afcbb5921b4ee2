"""Operators that read: readouts, abort conditions and pooled captures. They see a site after its edits."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from patchclamp_server.cpu.invariant import operators
from patchclamp_server.interventions.bound import BoundReadout
from patchclamp_server.interventions.operators import ConditionOperator, Grid, StepContext
from patchclamp_server.interventions.pooling import TokenPool
from patchclamp_server.interventions.program import ReadoutValue
from patchclamp_server.interventions.row_arithmetic import row_dots
from patchclamp_server.model.arrays import IntArray


@dataclass(frozen=True, eq=False)
class Reading:
    """Rows of one readout of one sequence: `uid` says whose, `positions` [n] where."""

    uid: int
    readout: BoundReadout
    positions: IntArray


class ReadoutOperator:
    """Reads rows of all sequences that ask for one kind of readout at a place; subclasses say what."""

    def __init__(self, layer: int, rows: Tensor, readings: list[Reading]) -> None:
        self.layer = layer
        self.rows = rows  # [E], reading after reading
        self.readings = readings
        self.values: Tensor | None = None  # [E, n]
        self.ids: Tensor | None = None  # [E, n]

    def run(self, x: Tensor, context: StepContext) -> None:
        self.values, self.ids = self.read(x.index_select(0, self.rows))

    def read(self, h: Tensor) -> tuple[Tensor, Tensor | None]:
        raise NotImplementedError

    def length(self, readout: BoundReadout) -> int:
        """Numbers that belong to one reading; the rows of other readings may be longer."""
        return readout.k

    def results(self) -> list[tuple[int, ReadoutValue]]:
        """(uid, value) of every row of the last step."""
        assert self.values is not None
        values = self.values.float().cpu().tolist()
        ids = self.ids.cpu().tolist() if self.ids is not None else None
        found = []
        row = 0
        for reading in self.readings:
            n = self.length(reading.readout)
            for position in reading.positions.tolist():
                own = tuple(ids[row][:n]) if ids is not None else reading.readout.ids
                value = ReadoutValue(reading.readout.name, self.layer, position, tuple(values[row][:n]), own)
                found.append((reading.uid, value))
                row += 1
        return found


class ProjectionOperator(ReadoutOperator):
    """h · u for every vector u of the row's readout; they were bound with unit length, as those of conditions are.
    Summed in float32."""

    def __init__(self, layer: int, rows: Tensor, readings: list[Reading], owner: Tensor, vectors: Tensor) -> None:
        super().__init__(layer, rows, readings)
        self.vectors = vectors.transpose(1, 2)  # [k, width, most]
        self.owner = owner
        self.grid = Grid(owner, len(readings))

    def read(self, h: Tensor) -> tuple[Tensor, Tensor | None]:
        h = h.float()
        if operators.holds_for(h):
            columns = [row_dots(h, column) for column in self.vectors.index_select(0, self.owner).unbind(2)]
            return torch.stack(columns, dim=1), None
        return self.grid.collect(torch.bmm(self.grid.spread(h), self.vectors)), None

    def length(self, readout: BoundReadout) -> int:
        return len(readout.vectors[self.layer])


class NeuronReadoutOperator(ReadoutOperator):
    """Values of the neurons each readout names."""

    def __init__(self, layer: int, rows: Tensor, readings: list[Reading], owner: Tensor) -> None:
        super().__init__(layer, rows, readings)
        most = max(len(r.readout.ids) for r in readings)
        padded = [list(r.readout.ids) + [0] * (most - len(r.readout.ids)) for r in readings]
        self.index = torch.tensor(padded, device=rows.device)[owner]  # [E, most]

    def read(self, h: Tensor) -> tuple[Tensor, Tensor | None]:
        return h.gather(1, self.index), None

    def length(self, readout: BoundReadout) -> int:
        return len(readout.ids)


class TopNeuronsOperator(ReadoutOperator):
    """The k neurons with the largest |a|, with their signed values."""

    def read(self, h: Tensor) -> tuple[Tensor, Tensor | None]:
        ids = torch.topk(h.abs(), max(r.readout.k for r in self.readings), dim=1).indices
        return h.gather(1, ids), ids


class LogitLensOperator(ReadoutOperator):
    """log softmax of the final norm and unembedding applied to a residual state: the k most likely tokens."""

    def __init__(self, layer: int, rows: Tensor, readings: list[Reading], unembed: Callable[[Tensor], Tensor]) -> None:
        super().__init__(layer, rows, readings)
        self.unembed = unembed

    def read(self, h: Tensor) -> tuple[Tensor, Tensor | None]:
        logprobs = torch.log_softmax(self.unembed(h), dim=1)
        top = torch.topk(logprobs, max(r.readout.k for r in self.readings), dim=1)
        return top.values, top.indices


@dataclass(frozen=True)
class AbortHit:
    uid: int
    name: str
    position: int


class AbortOperator:
    """Conditions that end their sequence."""

    def __init__(self, condition: ConditionOperator, entries: list[AbortHit]) -> None:
        self.condition = condition
        self.entries = entries  # one for each row of the condition
        self.held: Tensor | None = None

    def run(self, x: Tensor, context: StepContext) -> None:
        self.held = self.condition.holds(x)

    def results(self) -> list[AbortHit]:
        assert self.held is not None
        return [self.entries[i] for i in self.held.nonzero().flatten().tolist()]


@dataclass(frozen=True, eq=False)
class CaptureRows:
    """Rows of one sequence, tokens from position `start` on."""

    pool: TokenPool
    rows: slice
    start: int


class CaptureOperator:
    """Hands the rows of prompts to their pools."""

    def __init__(self, captures: list[CaptureRows], layer: int) -> None:
        self.captures = captures
        self.layer = layer

    def run(self, x: Tensor, context: StepContext) -> None:
        for capture in self.captures:
            capture.pool.add(self.layer, x[capture.rows], capture.start)
