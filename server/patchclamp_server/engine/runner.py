"""Runs one step: builds the ragged batch, compiles the programs in it, and calls the decoder once."""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from patchclamp_server.engine.attention import AttentionBatch, Span
from patchclamp_server.engine.kv_cache import KvCache
from patchclamp_server.engine.scheduler import Work
from patchclamp_server.engine.sequence import Sequence
from patchclamp_server.interventions.compiler import Setting
from patchclamp_server.interventions.plan import CaptureSpan, ProgramSpan, StepOutcome
from patchclamp_server.interventions.planner import Planner
from patchclamp_server.interventions.tables import Tables
from patchclamp_server.model.decoder import Decoder, StepInputs


@dataclass(frozen=True, eq=False)
class Prediction:
    """Row `row` of the step's logits predicts the token after `position` of a sequence."""

    sequence: Sequence
    position: int
    row: int


@dataclass(frozen=True, eq=False)
class StepResult:
    predictions: list[Prediction]
    logits: Tensor  # [len(predictions), vocab] float32
    outcome: StepOutcome
    # Work whose activations were not finite, with the first position where they were not.
    broken: list[tuple[Work, int]]


class Runner:
    def __init__(self, decoder: Decoder, cache: KvCache) -> None:
        self.decoder = decoder
        self.cache = cache
        self.threads = torch.get_num_threads()
        self.tables = Tables(decoder.dtype, decoder.device)
        spec = decoder.spec
        setting = Setting(
            self.tables, spec.n_heads, spec.head_dim, spec.sites, decoder.dtype, decoder.device, decoder.logits
        )
        self.planner = Planner(setting)

    @torch.inference_mode()
    def run(self, work: list[Work]) -> StepResult:
        """`work`: single tokens first, then chunks, as the scheduler orders them."""
        torch.set_num_threads(self.decoder.threads_for(sum(item.n for item in work), self.threads))
        size = self.cache.block_size
        device = self.decoder.device
        tokens: list[int] = []
        spans: list[Span] = []
        programs: list[ProgramSpan] = []
        for item in work:
            sequence, row = item.sequence, len(tokens)
            new = sequence.tokens[sequence.computed : sequence.computed + item.n]
            tokens += new
            spans.append(Span(row, item.n, sequence.computed, sequence.blocks))
            if sequence.state is not None or sequence.capture is not None:
                programs.append(_program_span(sequence, row, np.array(new, dtype=np.int64)))
        positions = np.concatenate([np.arange(s.offset, s.offset + s.n) for s in spans])
        slots = np.concatenate([_slots(s, size) for s in spans])
        step = StepInputs(
            torch.tensor(tokens, device=device),
            torch.from_numpy(positions).to(device),
            torch.from_numpy(slots).to(device),
            AttentionBatch(spans, size, self.decoder.windows, device),
        )
        plan = self.planner.plan(programs)
        plan.begin(step.positions, self.decoder.dtype)
        x = self.decoder.forward(step, self.cache.pools, plan)
        outcome = plan.finish()

        finite = torch.isfinite(x.sum(dim=1)).cpu().numpy()
        broken = []
        if not finite.all():
            for item, span in zip(work, spans, strict=True):
                own = finite[span.start : span.start + span.n]
                if not own.all():
                    broken.append((item, span.offset + int(own.argmin())))
        predictions, rows = self._predictions(work, spans, {id(item) for item, _ in broken})
        logits = self.decoder.logits(x[rows] if len(rows) != len(x) else x)
        return StepResult(predictions, logits, outcome, broken)

    def _predictions(self, work: list[Work], spans: list[Span], broken: set[int]) -> tuple[list[Prediction], list[int]]:
        predictions: list[Prediction] = []
        rows: list[int] = []
        for item, span in zip(work, spans, strict=True):
            if id(item) in broken:
                continue
            first = max(item.sequence.needs_logits_from(), span.offset)
            for position in range(first, span.offset + span.n):
                predictions.append(Prediction(item.sequence, position, len(rows)))
                rows.append(span.start + position - span.offset)
        return predictions, rows


def _slots(span: Span, size: int) -> np.ndarray:
    """Token addresses block * size + offset of the tokens of a span."""
    if span.n == 1:
        return np.array([span.blocks[span.offset // size] * size + span.offset % size])
    positions = np.arange(span.offset, span.offset + span.n)
    blocks = np.array(span.blocks, dtype=np.int64)
    slots: np.ndarray = blocks[positions // size] * size + positions % size
    return slots


def _program_span(sequence: Sequence, row: int, tokens: np.ndarray) -> ProgramSpan:
    capture = None
    asked = sequence.request.capture
    if asked is not None and sequence.capture is not None:
        capture = CaptureSpan(sequence.capture, asked.site, asked.pooling)
    return ProgramSpan(sequence.state, row, sequence.computed, tokens, sequence.prompt_length, capture)
