"""One running sequence: its tokens, how far they are computed, and where its KV blocks are."""

import math
import time
from dataclasses import dataclass, field
from enum import Enum
from functools import cached_property

import numpy as np
import torch
from torch import Tensor

from patchclamp_server.engine.kv_cache import ROOT_KEY, BlockKey, block_key
from patchclamp_server.engine.output import Output
from patchclamp_server.engine.request import (
    Captured,
    Divergence,
    Failed,
    Finished,
    FinishReason,
    Priority,
    PromptToken,
    Request,
    Timeline,
    Token,
    Usage,
)
from patchclamp_server.engine.sampler import Sampled, SamplingRow
from patchclamp_server.engine.sparse_sequence import SparseSequence
from patchclamp_server.errors import RequestError
from patchclamp_server.interventions.pooling import TokenPool
from patchclamp_server.interventions.program import Receipt
from patchclamp_server.interventions.spans import CaptureSpan
from patchclamp_server.interventions.state import ProgramState
from patchclamp_server.model.arrays import IntArray


class Status(Enum):
    WAITING = "waiting"
    RUNNING = "running"
    FINISHED = "finished"


@dataclass(eq=False)
class Sequence:
    """A request while it is in the engine.

    Invariant: 0 <= computed <= len(tokens); `blocks` cover at least the computed tokens; `keys[i]` is the key of
    block i, and `keys` is at least as long as the full blocks of computed tokens when prefixes are shared. `blocks` is
    another list whenever blocks are given back, and a list that only grows until then.
    """

    id: int
    request: Request
    seed: int
    state: ProgramState | None
    # What takes the rows of its prompt, each at the site of its capture or of one of its reductions.
    captures: tuple[CaptureSpan, ...]
    # None for a follower, which says nothing itself.
    output: Output | None
    # Boundary between PHASE_PROMPT and PHASE_GENERATED.
    prompt_length: int
    arrival: float = field(default_factory=time.monotonic)
    status: Status = Status.WAITING
    tokens: list[int] = field(default_factory=list)
    # The tokens after the prompt.
    output_ids: list[int] = field(default_factory=list)
    computed: int = 0
    # The most that `computed` has been: a token before that is computed again, after a preemption.
    reached: int = 0
    cached: int = 0
    blocks: list[int] = field(default_factory=list)
    keys: list[BlockKey] = field(default_factory=list)
    credits: int | None = None
    preempted_at: list[float] = field(default_factory=list)
    first_token_at: float | None = None
    last_token_at: float | None = None
    # Set once the prompt has been looked up in the prefix cache, so that a preempted sequence is not counted twice.
    admitted_at: float | None = None
    # Tokens before this position have been charged to the caller.
    charged: int = 0
    # Since when its client keeps it waiting, while it holds a place.
    paused_at: float | None = None
    # Its client has kept it waiting while it held a place: how long it took says nothing about the engine.
    was_paused: bool = False
    # Follows another sequence along its tokens, to compare with it; or is followed.
    leader: "Sequence | None" = None
    follower: "Sequence | None" = None
    # Log-probabilities [vocab] the follower has not been compared with yet, by the position they predict.
    predictions: dict[int, Tensor] = field(default_factory=dict)
    # The last answer of `reusable_until` with what it depends on.
    _reusable: tuple[tuple[int, int], int] | None = None
    # Why it ended, while its follower is still catching up.
    ended: FinishReason | None = None
    sparse: SparseSequence | None = None

    @cached_property
    def priority(self) -> tuple[int, float]:
        return (int(self.request.priority), self.arrival)

    @property
    def is_served(self) -> bool:
        """What a client asked for, and not an analysis or a baseline beside it."""
        return self.leader is None and self.request.priority is not Priority.ANALYSIS

    @cached_property
    def scores(self) -> bool:
        """All tokens are known from the start, and their log-probabilities are asked for."""
        return self.request.score_from is not None

    @cached_property
    def samples_nothing(self) -> bool:
        """It ends when it has computed all that it needs."""
        return self.leader is not None or self.scores or self.request.stop.max_tokens == 0

    @property
    def target(self) -> int:
        """Tokens to compute.

        The last token of a scored text predicts nothing that is asked for; a follower computes what its leader has.
        """
        if self.leader is not None:
            return self.leader.computed
        return len(self.tokens) - 1 if self.scores else len(self.tokens)

    @property
    def remaining(self) -> int:
        if self.leader is None and not self.scores:
            # The target of nearly all, which is asked for at every token.
            return len(self.tokens) - self.computed
        return self.target - self.computed

    @property
    def chunk(self) -> int:
        """Tokens that may run in one step."""
        return self.chunk_from(self.computed)

    def chunk_from(self, computed: int) -> int:
        boundary = None if self.sparse is None else self.sparse.next_boundary(computed)
        return (self.target if boundary is None else min(self.target, boundary)) - computed

    @property
    def paused(self) -> bool:
        """Its client has to do something before it goes on: grant tokens, or read."""
        return self.credits == 0 or self.request.held()

    @property
    def runnable(self) -> bool:
        return self.remaining > 0 and not self.paused

    def samples_after(self, position: int) -> bool:
        """Whether a token is drawn behind `position`, which is one of the prompt."""
        return position + 1 == self.prompt_length and not self.samples_nothing

    def needs_logits_from(self) -> int:
        """First position whose logits are needed; behind the last one where nothing is predicted."""
        if self.request.score_from is not None:
            # Those before `reached` have been scored, before a preemption.
            return max(self.request.score_from - 1, self.reached)
        if self.request.prompt_logprobs is not None and self.leader is None and self.reached < self.prompt_length:
            return self.reached
        if self.leader is not None:
            return self.prompt_length - 1
        if self.samples_nothing:
            return len(self.tokens)
        return len(self.tokens) - 1

    def token_array(self, start: int, end: int) -> IntArray:
        return np.array(self.tokens[start:end], dtype=np.int64)

    def extend_keys(self, upto: int, block_size: int) -> None:
        """Keys of all full blocks of the first `upto` tokens."""
        while (len(self.keys) + 1) * block_size <= upto:
            self.keys.append(self.key_at(len(self.keys), block_size))

    def key_at(self, index: int, block_size: int) -> BlockKey:
        start = index * block_size
        tokens = self.token_array(start, start + block_size)
        touched = b""
        if self.state is not None:
            touched = self.state.touched_digest(np.arange(start, start + block_size, dtype=np.int64), tokens)
        parent = self.keys[index - 1] if index else ROOT_KEY
        return block_key(parent, tokens.tobytes(), touched)

    def shareable_until(self) -> int:
        """First token whose block is not made known to others: it depends on more than its tokens and edits, or nobody
        comes back to it."""
        if self.request.reductions:
            # Passed over once: known to others, it would drive out what they do come back to.
            return 0
        end = len(self.tokens) if self.sparse is None else self.prompt_length
        if self.state is None:
            return end
        return min(end, self.state.first_unshareable(self.token_array(0, len(self.tokens))))

    def reusable_until(self) -> int:
        """Tokens before this position may be taken from the prefix cache; at least one is left to be computed."""
        if self.captures:
            return 0
        counted = self.state.counted if self.state is not None else 0
        asked = (len(self.tokens), counted)
        # A waiting sequence is asked in every step.
        if self._reusable is None or self._reusable[0] != asked:
            until = min(self.needs_logits_from(), len(self.tokens) - 1, self.shareable_until())
            if self.sparse is not None:
                until = min(until, self.sparse.reusable_until)
            if self.state is not None:
                until = min(until, self.state.first_observed(self.token_array(0, len(self.tokens))))
            self._reusable = (asked, until)
        return self._reusable[1]

    def output_or_fail(self) -> Output:
        assert self.output is not None
        return self.output

    @cached_property
    def sampling_row(self) -> SamplingRow:
        stop = self.request.stop
        ends = self.output_or_fail().eos_token_ids | stop.token_ids if stop.min_tokens else ()
        return SamplingRow(
            self.request.sampling, self.seed, self.request.tokens, self.output_ids, tuple(ends), stop.min_tokens
        )

    def accept(self, choice: Sampled, context_length: int) -> FinishReason | None:
        """Appends a sampled token and emits it; the reason when it is the last one."""
        request, tokens, emit = self.request, self.tokens, self.request.on_event
        id, logprob, top_logprobs = choice
        position = len(tokens)
        tokens.append(id)
        self.output_ids.append(id)
        if self.credits is not None:
            self.credits -= 1
        emit(Token(id, position, logprob, top_logprobs))
        assert self.output is not None
        reason = self.output.push(id, len(self.output_ids), request.stop, emit)
        if reason is not None:
            return reason
        full = position + 1 >= context_length
        return FinishReason.LENGTH if full or len(self.output_ids) >= request.stop.max_tokens else None

    def score(self, position: int, logits: Tensor) -> bool:
        """Emits the log-probability of the known token after `position`; False where it is not a number."""
        logprobs = torch.log_softmax(logits, dim=0)
        token = self.tokens[position + 1]
        logprob = float(logprobs[token])
        if math.isnan(logprob):
            return False
        if self.request.scores is not None:
            self.request.scores.add(position + 1, logprobs)
        self.request.on_event(Token(token, position + 1, logprob, _likeliest(logprobs, self.request.sampling.logprobs)))
        return True

    def score_prompt(self, position: int, logits: Tensor) -> bool:
        """As `score`, of a token of the prompt; the first comes before the one after it, or alone."""
        emit = self.request.on_event
        if position == 0:
            emit(PromptToken(self.tokens[0], 0))
        if position + 1 >= self.prompt_length:
            return True
        logprobs = torch.log_softmax(logits, dim=0)
        token = self.tokens[position + 1]
        logprob = float(logprobs[token])
        if math.isnan(logprob):
            return False
        emit(PromptToken(token, position + 1, logprob, _likeliest(logprobs, self.request.prompt_logprobs)))
        return True

    def compare(self, position: int, logits: Tensor) -> None:
        """Emits KL(own ‖ other) of the predictions for the token after `position`; `logits` are the other's."""
        own = self.predictions.pop(position + 1, None)
        if own is None:
            return
        other = torch.log_softmax(logits.double(), dim=0)
        kl = float((own.exp() * (own - other)).sum())
        same = bool(own.argmax() == other.argmax())
        self.request.on_event(Divergence(position + 1, self.tokens[position + 1], max(kl, 0.0), same))

    def usage(self, now: float) -> Usage:
        return Usage(
            prompt_tokens=self.prompt_length,
            cached_prompt_tokens=min(self.cached, self.prompt_length),
            generated_tokens=len(self.tokens) - self.prompt_length,
            time_to_first_token_seconds=(self.first_token_at or now) - self.arrival,
            total_seconds=now - self.arrival,
            preemptions=len(self.preempted_at),
        )

    def timeline(self, now: float) -> Timeline:
        return Timeline(self.admitted_at, self.first_token_at, now, tuple(self.preempted_at))

    def failed(self, error: RequestError) -> Failed:
        """The event that it failed now."""
        now = time.monotonic()
        return Failed(error, self.usage(now), self.timeline(now))

    def emit_finished(self, reason: FinishReason, receipt: Receipt) -> None:
        now = time.monotonic()
        output = self.output_or_fail()
        output.flush(self.request.on_event)
        for capture in self.captures:
            if isinstance(capture.pool, TokenPool):
                self.request.on_event(Captured(capture.pool.result()))
        sparsity = None if self.sparse is None else self.sparse.report(self.computed)
        self.request.on_event(
            Finished(
                reason,
                receipt,
                self.usage(now),
                self.seed,
                output.stop_string,
                sparsity,
                self.timeline(now),
            )
        )


def _likeliest(logprobs: Tensor, n: int | None) -> tuple[tuple[int, float], ...]:
    """Returns the n most likely tokens [vocab] with their log-probabilities."""
    if not n:
        return ()
    best = torch.topk(logprobs, min(n, len(logprobs)))
    return tuple(zip(best.indices.tolist(), best.values.tolist(), strict=True))
