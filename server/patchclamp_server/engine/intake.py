"""What a request must be to run, what it needs, and the sequence that runs it."""

import math
import time

import numpy as np

from patchclamp_server.engine.admission import Admission, Demand, Refusal
from patchclamp_server.engine.output import Output
from patchclamp_server.engine.reducers.gathered import GatheredRows
from patchclamp_server.engine.reducers.reducer import Reducer
from patchclamp_server.engine.request import Request
from patchclamp_server.engine.sampler import drawn_seed
from patchclamp_server.engine.sequence import Sequence
from patchclamp_server.engine.sparse_sequence import SparseSequence
from patchclamp_server.errors import InvalidArgument
from patchclamp_server.interventions.pooling import TokenPool
from patchclamp_server.interventions.program import Scope
from patchclamp_server.interventions.scopes import SequenceTokens, scope_mask
from patchclamp_server.interventions.spans import CaptureSpan
from patchclamp_server.interventions.state import ProgramState
from patchclamp_server.interventions.tables import Tables
from patchclamp_server.model.load import LoadedModel
from patchclamp_server.model.sites import Site
from patchclamp_server.text.detokenize import IncrementalDetokenizer, StopChecker
from patchclamp_server.text.vocabulary import check_ids


class Intake:
    def __init__(self, model: LoadedModel, tables: Tables, admission: Admission, kv_tokens: int) -> None:
        """`kv_tokens`: how many the KV cache has room for."""
        self._model, self._tables, self._admission = model, tables, admission
        self._kv_tokens = kv_tokens

    # Any thread.

    def check(self, request: Request) -> None:
        """Raises InvalidArgument for what can never run."""
        context = self._model.info.context_length
        # Whoever made the request has checked them where they came from; one missed would fail a step of everybody.
        check_ids(request.tokens, self._model.info.vocab_size, "prompt")
        length = len(request.tokens)
        if not length:
            raise InvalidArgument("prompt", "the prompt is empty")
        if length > context:
            raise InvalidArgument("prompt", f"{length} tokens are more than the context of {context}")
        longest = self._longest(request)
        if longest > self._kv_tokens:
            raise InvalidArgument(
                "prompt", f"prompt and max_tokens need {longest} tokens of KV cache, which has {self._kv_tokens}"
            )
        if request.score_from is not None and not 1 <= request.score_from < length:
            raise InvalidArgument("continuation", "scoring needs at least one prompt token and one continuation token")
        if request.score_from is not None and request.sparsity is not None and request.sparsity.guard is not None:
            raise InvalidArgument("sparsity.guard", "a guard watches generation; scoring has none")

    def demand(self, request: Request) -> Demand:
        longest = self._longest(request)
        return Demand(
            request.caller,
            request.priority,
            kv_tokens=2 * longest if request.compare_baseline else longest,
            prompt_tokens=len(request.tokens),
            max_tokens=longest - len(request.tokens),
            may_stop_early=_may_stop_early(request),
        )

    def _longest(self, request: Request) -> int:
        """Tokens it may come to have."""
        generated = 0 if request.score_from is not None else request.stop.max_tokens
        return min(len(request.tokens) + generated, self._model.info.context_length)

    # The engine's thread.

    def late(self, sequence: Sequence) -> Refusal | None:
        """Why it need not start any more, where that is so."""
        deadline = sequence.request.deadline
        if deadline is None or sequence.leader is not None:
            return None
        return self._admission.check_start(self.demand(sequence.request), deadline - time.monotonic())

    def expected_length(self, sequence: Sequence) -> int:
        """Tokens that a sequence is expected to have in the end."""
        most = self._longest(sequence.request) - sequence.prompt_length
        expected = self._admission.expected_tokens(most, may_stop_early=_may_stop_early(sequence.request))
        return max(len(sequence.tokens), sequence.prompt_length + math.ceil(expected))

    def sequence(self, request_id: int, request: Request, arrival: float) -> Sequence:
        """With its follower, where its baseline is compared. Rows of the tables are held for its program."""
        model = self._model
        prompt_length = len(request.tokens) if request.score_from is None else request.score_from
        sequence = Sequence(
            id=request_id,
            request=request,
            seed=drawn_seed() if request.sampling.seed is None else request.sampling.seed,
            state=None,
            captures=_captures(request, prompt_length),
            output=Output(
                IncrementalDetokenizer(model.tokenizer, after=request.tokens[:prompt_length]),
                StopChecker(request.stop.strings, request.stop.include_stop_string),
                frozenset() if request.stop.ignore_eos else model.eos_token_ids,
            ),
            prompt_length=prompt_length,
            arrival=arrival,
            tokens=list(request.tokens),
            credits=request.credits,
        )
        if request.sparsity is not None:
            sequence.sparse = SparseSequence.of(
                request.sparsity, request.program, 0 if request.sparsity.listens else prompt_length
            )
        if request.compare_baseline:
            sequence.follower = _follower(sequence)
        program = request.program
        # The last thing, since rows are held from here on.
        if program is not None and (program.edits or program.readouts or program.aborts):
            loaded = self._tables.load(program)
            try:
                tokens = SequenceTokens(prompt_length, request.roles)
                sequence.state = ProgramState(request_id, program, tokens, loaded)
            except BaseException:
                self._tables.release(loaded)
                raise
        return sequence


def _captures(request: Request, prompt_length: int) -> tuple[CaptureSpan, ...]:
    if (asked := request.capture) is not None:
        inside = None
        if asked.scope != Scope():
            ids = np.array(request.tokens[:prompt_length], dtype=np.int64)
            sequence = SequenceTokens(prompt_length, request.roles)
            inside = scope_mask(asked.scope, sequence, np.arange(prompt_length), ids)
        pool = TokenPool(asked.pooling, asked.layers, prompt_length, inside=inside)
        return (CaptureSpan(pool, asked.site),)
    ids = np.array(request.tokens[:prompt_length] if request.reductions else (), dtype=np.int64)
    together: dict[tuple[Site, int, int], list[Reducer]] = {}
    for reduction in request.reductions:
        together.setdefault((reduction.site, reduction.text, reduction.label), []).append(reduction.reducer)
    return tuple(
        CaptureSpan(GatheredRows(reducers, text, label, ids), site)
        for (site, text, label), reducers in together.items()
    )


def _follower(leader: Sequence) -> Sequence:
    """Shares the list of tokens: it runs along whatever the leader generates."""
    request = leader.request
    return Sequence(
        id=leader.id,
        request=Request(request.tokens, on_event=lambda event: None, priority=request.priority, caller=request.caller),
        seed=0,
        state=None,
        captures=(),
        output=None,
        prompt_length=leader.prompt_length,
        arrival=leader.arrival,
        tokens=leader.tokens,
        leader=leader,
    )


def _may_stop_early(request: Request) -> bool:
    stop, program = request.stop, request.program
    aborts = program is not None and bool(program.aborts)
    return not stop.ignore_eos or bool(stop.strings or stop.token_ids) or aborts or request.credits is not None
