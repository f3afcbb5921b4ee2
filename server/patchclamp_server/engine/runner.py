"""Runs one step: builds the ragged batch, has it executed, and says which row predicts what."""

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from patchclamp_server.engine.batch import Executor, StepBatch
from patchclamp_server.engine.block_tables import BlockTables
from patchclamp_server.engine.kv_cache import KvCache
from patchclamp_server.engine.scheduler import Work
from patchclamp_server.engine.sequence import Sequence
from patchclamp_server.interventions.spans import ProgramSpan, StepOutcome
from patchclamp_server.model.attention.spans import Span, Spans
from patchclamp_server.model.overflow import Overflow
from patchclamp_server.monitoring.registry import WatchRegistry
from patchclamp_server.monitoring.step import ServedSpan
from patchclamp_server.sparsity.apply import Forced, Rows

NONE_FORCED: Forced = {}


class Prediction(NamedTuple):
    """Row `row` of the step's logits predicts the token after `position` of a sequence."""

    sequence: Sequence
    position: int
    row: int


@dataclass(frozen=True, eq=False)
class StepResult:
    """Rows of work that broke predict nothing."""

    predictions: list[Prediction]
    logits: Tensor  # [rows, vocab] float32
    outcome: StepOutcome
    # Work whose activations were not finite, with the first position where they were not.
    broken: list[tuple[Work, int]]


class Runner:
    def __init__(self, executor: Executor, cache: KvCache, monitor: WatchRegistry, dtype: torch.dtype) -> None:
        """`dtype` is that of activations."""
        self.executor = executor
        self.monitor = monitor
        self.cache = cache
        self.block_size = cache.block_size
        self.dtype = dtype
        self._tables = BlockTables()

    @torch.inference_mode()
    def run(self, work: list[Work]) -> StepResult:
        """`work`: single tokens first, then chunks, as the scheduler orders them."""
        offsets = [w.sequence.computed for w in work]
        tokens = [token for (s, n), at in zip(work, offsets, strict=True) for token in s.tokens[at : at + n]]
        token_ids = np.array(tokens, dtype=np.int64)
        spans = Spans(
            np.array([w.n for w in work], dtype=np.int64),
            np.array(offsets, dtype=np.int64),
            self._tables.of([w.sequence.blocks for w in work]),
        )
        starts = spans.starts.tolist()
        programs: list[ProgramSpan] = []
        predictions: list[Prediction] = []
        rows: list[int] = []
        sparse: list[Rows] = []
        monitor, served, watching = self.monitor, list[ServedSpan](), self.monitor.active
        for (sequence, n), row, offset in zip(work, starts, offsets, strict=True):
            if sequence.state is not None or sequence.captures:
                programs.append(_program_span(sequence, row, offset, token_ids[row : row + n]))
            if watching and sequence.is_served:
                new = tokens[row : row + n]
                served.append(ServedSpan(row, offset, new, sequence.id, sequence.prompt_length, fresh=sequence.reached))
            if sequence.sparse is not None:
                watched: Forced = monitor.forced if sequence.is_served else NONE_FORCED
                selected = sequence.sparse.rows(row, offset, n, watched)
                if selected is not None:
                    sparse.append(selected)
            for position in range(max(sequence.needs_logits_from(), offset), offset + n):
                predictions.append(Prediction(sequence, position, len(rows)))
                rows.append(row + position - offset)
        watch = monitor.begin(served) if served else None
        batch = StepBatch(token_ids, spans, programs, rows, self.block_size, sparse=sparse, watch=watch)
        executed = self.executor.execute(batch)
        if watch is not None:
            monitor.end(watch)
        for sequence, n in work:
            if sequence.reached < sequence.computed + n:
                sequence.reached = sequence.computed + n
        broken = []
        if not executed.finite.all():
            for item, start, offset in zip(work, starts, offsets, strict=True):
                own = executed.finite[start : start + item.n]
                if not own.all():
                    broken.append((item, offset + int(own.argmin())))
            lost = {id(item.sequence) for item, _ in broken}
            predictions = [p for p in predictions if id(p.sequence) not in lost]
        return StepResult(predictions, executed.logits, executed.outcome, broken)

    @torch.inference_mode()
    def locate(self, item: Work) -> Overflow:
        """Where the activations of work that broke stopped being finite. Its KV is written as the step wrote it."""
        sequence, offset = item.sequence, item.sequence.computed
        new = sequence.token_array(offset, offset + item.n)
        batch = StepBatch(
            token_ids=new,
            spans=Spans.of([Span(0, item.n, offset, sequence.blocks)], self.block_size),
            programs=[_program_span(sequence, 0, offset, new)] if sequence.state is not None else [],
            logit_rows=[],
            block_size=self.block_size,
        )
        has_edits = sequence.state is not None and bool(sequence.state.bound.edits)
        edited = self.executor.trace(batch, edited=True).first if has_edits else None
        return Overflow(edited, self.executor.trace(batch, edited=False).first, has_edits)

    @torch.inference_mode()
    def run_densely(self, sequences: list[Sequence]) -> Tensor:
        """Logits [n, vocab] of the token that each sequence computed last, had it been computed densely.

        Leaves no trace: what the step writes, KV and latches, is put back, and receipts count no token twice.
        """
        token_ids = np.array([s.tokens[s.computed - 1] for s in sequences], dtype=np.int64)
        spans = [Span(row, 1, s.computed - 1, s.blocks) for row, s in enumerate(sequences)]
        batch = StepBatch(
            token_ids=token_ids,
            spans=Spans.of(spans, self.block_size),
            programs=[
                _program_span(s, row, s.computed - 1, token_ids[row : row + 1])
                for row, s in enumerate(sequences)
                if s.state is not None
            ],
            logit_rows=list(range(len(sequences))),
            block_size=self.block_size,
        )
        latch = self.executor.tables.latch
        latches, kept = latch.clone(), self.cache.read(batch.slots)
        logits = self.executor.execute(batch).logits
        self.cache.write(batch.slots, kept)
        latch.copy_(latches)
        return logits


def _program_span(sequence: Sequence, row: int, offset: int, tokens: np.ndarray) -> ProgramSpan:
    return ProgramSpan(sequence.state, row, offset, tokens, sequence.prompt_length, sequence.captures)
