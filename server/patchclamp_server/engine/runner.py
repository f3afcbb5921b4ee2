"""Runs one step: builds the ragged batch, has it executed, and says which row predicts what."""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from patchclamp_server.engine.batch import Executor, StepBatch
from patchclamp_server.engine.kv_cache import KvCache
from patchclamp_server.engine.scheduler import Work
from patchclamp_server.engine.sequence import Sequence
from patchclamp_server.interventions.plan import CaptureSpan, ProgramSpan, StepOutcome
from patchclamp_server.model.attention.batch import Span
from patchclamp_server.model.overflow import Overflow
from patchclamp_server.monitoring.registry import WatchRegistry
from patchclamp_server.monitoring.step import ServedSpan
from patchclamp_server.sparsity.apply import Forced, Rows

NONE_FORCED: Forced = {}


@dataclass(frozen=True, eq=False)
class Prediction:
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
    def __init__(self, executor: Executor, cache: KvCache, monitor: WatchRegistry) -> None:
        self.executor = executor
        self.monitor = monitor
        self.cache = cache
        self.block_size = cache.block_size
        self.dtype = cache.pools[0].dtype

    @torch.inference_mode()
    def run(self, work: list[Work]) -> StepResult:
        """`work`: single tokens first, then chunks, as the scheduler orders them."""
        tokens: list[int] = []
        spans: list[Span] = []
        programs: list[ProgramSpan] = []
        predictions: list[Prediction] = []
        rows: list[int] = []
        sparse: list[Rows] = []
        monitor, served = self.monitor, list[ServedSpan]()
        for item in work:
            sequence, row, offset = item.sequence, len(tokens), item.sequence.computed
            new = sequence.tokens[offset : offset + item.n]
            tokens += new
            spans.append(Span(row, item.n, offset, sequence.blocks))
            if sequence.state is not None or sequence.capture is not None:
                programs.append(_program_span(sequence, row, offset, np.array(new, dtype=np.int64)))
            if monitor.active and sequence.is_served:
                served.append(ServedSpan(row, offset, new, sequence.id, sequence.prompt_length, fresh=sequence.reached))
            if sequence.sparse is not None:
                watched: Forced = monitor.forced if sequence.is_served else NONE_FORCED
                selected = sequence.sparse.rows(row, offset, item.n, watched)
                if selected is not None:
                    sparse.append(selected)
            for position in range(max(sequence.needs_logits_from(), offset), offset + item.n):
                predictions.append(Prediction(sequence, position, len(rows)))
                rows.append(row + position - offset)
        watch = monitor.begin(served) if served else None
        batch = StepBatch(tokens, spans, programs, rows, self.block_size, sparse=sparse, watch=watch)
        executed = self.executor.execute(batch)
        if watch is not None:
            monitor.end(watch)
        for item in work:
            item.sequence.reached = max(item.sequence.reached, item.sequence.computed + item.n)
        broken = []
        if not executed.finite.all():
            for item, span in zip(work, spans, strict=True):
                own = executed.finite[span.start : span.start + span.n]
                if not own.all():
                    broken.append((item, span.offset + int(own.argmin())))
            lost = {id(item.sequence) for item, _ in broken}
            predictions = [p for p in predictions if id(p.sequence) not in lost]
        return StepResult(predictions, executed.logits, executed.outcome, broken)

    @torch.inference_mode()
    def locate(self, item: Work) -> Overflow:
        """Where the activations of work that broke stopped being finite. Its KV is written as the step wrote it."""
        sequence, offset = item.sequence, item.sequence.computed
        new = sequence.token_array(offset, offset + item.n)
        batch = StepBatch(
            token_ids=new.tolist(),
            spans=[Span(0, item.n, offset, sequence.blocks)],
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
        batch = StepBatch(
            token_ids=[s.tokens[s.computed - 1] for s in sequences],
            spans=[Span(row, 1, s.computed - 1, s.blocks) for row, s in enumerate(sequences)],
            programs=[
                _program_span(s, row, s.computed - 1, s.token_array(s.computed - 1, s.computed))
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
    capture = None
    asked = sequence.request.capture
    if asked is not None and sequence.capture is not None:
        capture = CaptureSpan(sequence.capture, asked.site)
    return ProgramSpan(sequence.state, row, offset, tokens, sequence.prompt_length, capture)
