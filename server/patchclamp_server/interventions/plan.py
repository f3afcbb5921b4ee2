"""The compiled programs of one step: operators at sites, run by the decoder as it passes them."""

from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from patchclamp_server.interventions.observers import AbortHit, AbortOperator, ReadoutOperator
from patchclamp_server.interventions.operators import Operator, StepContext
from patchclamp_server.interventions.pooling import TokenPool
from patchclamp_server.interventions.program import ReadoutValue
from patchclamp_server.interventions.state import ProgramState
from patchclamp_server.interventions.tables import Tables
from patchclamp_server.model.arrays import IntArray
from patchclamp_server.model.sites import Site

Place = tuple[Site, int]


@dataclass(frozen=True, eq=False)
class CaptureSpan:
    pool: TokenPool
    site: Site


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
    def rows(self) -> slice:
        return slice(self.row, self.row + len(self.token_ids))

    @property
    def reusable(self) -> bool:
        """Whether the next token of the sequence needs the same plan: a new generated token, settled scopes, and
        nothing that is bound to its position, as captures and readouts at sites are."""
        if self.capture is not None or len(self.token_ids) != 1 or self.offset < self.prompt_length:
            return False
        if self.state is None:
            return True
        bound = self.state.bound
        return self.state.settled and self.offset >= self.state.counted and not (bound.site_readouts or bound.aborts)


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
        # Of the step that runs.
        self.context: StepContext | None = None

    @property
    def edited_queries(self) -> frozenset[int]:
        """Layers whose queries are edited."""
        return frozenset(layer for site, layer in self.operators if site is Site.ATTN_Q)

    def begin(self, positions: Tensor) -> None:
        opened = torch.zeros(self.n_open + 1, device=positions.device)
        opened[-1] = 1.0
        self.context = StepContext(positions, self.tables.latch, opened, [], [], [])

    def visit(self, site: Site, layer: int, x: Tensor) -> None:
        for operator in self.operators.get((site, layer), ()):
            assert self.context is not None
            operator.run(x, self.context)

    def finish(self) -> StepOutcome:
        """Adds the step to the receipts, and brings what was read to the host."""
        context = self.context
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
