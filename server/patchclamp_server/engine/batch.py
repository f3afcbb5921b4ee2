"""One step as the host knows it, and what running it brings back. Executors turn the one into the other."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Protocol

import numpy as np
from torch import Tensor

from patchclamp_server.engine.executors.sparse_decoder import SparseBlocks
from patchclamp_server.interventions.spans import ProgramSpan, StepOutcome
from patchclamp_server.interventions.tables import Tables
from patchclamp_server.model.arrays import BoolArray, IntArray
from patchclamp_server.model.attention.spans import Spans
from patchclamp_server.model.overflow import FiniteProbe
from patchclamp_server.monitoring.step import StepWatch
from patchclamp_server.sparsity.apply import Rows

PADDING_SLOT = -1


@dataclass(frozen=True, eq=False)
class StepBatch:
    """T rows: single tokens first, then chunks. `programs`: the spans that have a program or a capture. `sparse`: rows
    that a sparse policy selects for or observes. `watch`: rows that are watched. Rows of `padding` are written to no
    block."""

    token_ids: IntArray  # [T]
    spans: Spans
    programs: list[ProgramSpan]
    # Rows whose next token is predicted, ascending.
    logit_rows: list[int]
    block_size: int
    padding: bool = False
    sparse: Sequence[Rows] = ()
    watch: StepWatch | None = None

    @property
    def positions(self) -> IntArray:  # [T]
        return self.spans.positions

    @cached_property
    def slots(self) -> IntArray:
        """Token addresses block * block_size + offset in the KV pool, [T]."""
        if self.padding:
            return np.full(len(self.token_ids), PADDING_SLOT, dtype=np.int64)
        return self.spans.slots(self.block_size)


@dataclass(frozen=True, eq=False)
class Executed:
    finite: BoolArray  # [T], whether the residual stream of the row was finite to the end
    logits: Tensor  # [len(logit_rows), vocab] float32
    outcome: StepOutcome


class Executor(Protocol):
    """Runs steps, and owns the device tables of the programs in them."""

    @property
    def tables(self) -> Tables: ...
    @property
    def sparse(self) -> SparseBlocks: ...
    def execute(self, batch: StepBatch) -> Executed: ...
    def trace(self, batch: StepBatch, *, edited: bool) -> FiniteProbe:
        """Runs a step of sequences that have failed, to see where; spoils their receipts and latches."""
        ...
