"""What a step runs of each sequence, as plans see it, and what a step brings back."""

from dataclasses import dataclass, field

import numpy as np

from patchclamp_server.interventions.kinds.latents import LatentRows
from patchclamp_server.interventions.pooling import RowSink
from patchclamp_server.interventions.program import ReadoutValue
from patchclamp_server.interventions.state import ProgramState
from patchclamp_server.model.arrays import IntArray
from patchclamp_server.model.sites import Site

Place = tuple[Site, int]


@dataclass(frozen=True, eq=False)
class CaptureSpan:
    """What takes the rows of a prompt at one site."""

    pool: RowSink
    site: Site


@dataclass(frozen=True, eq=False)
class ProgramSpan:
    """Rows [row, row + n) of the batch are tokens of one sequence from position `offset` on."""

    state: ProgramState | None
    row: int
    offset: int
    token_ids: IntArray  # [n]
    prompt_length: int
    captures: tuple[CaptureSpan, ...] = ()

    @property
    def positions(self) -> IntArray:
        return np.arange(self.offset, self.offset + len(self.token_ids), dtype=np.int64)

    @property
    def rows(self) -> slice:
        return slice(self.row, self.row + len(self.token_ids))


@dataclass(frozen=True)
class AbortHit:
    """The abort condition `name` of the sequence `uid` held at `position`."""

    uid: int
    name: str
    position: int


@dataclass(eq=False)
class StepOutcome:
    aborts: list[AbortHit] = field(default_factory=list)
    readouts: list[tuple[int, ReadoutValue]] = field(default_factory=list)
    latents: list[LatentRows] = field(default_factory=list)
