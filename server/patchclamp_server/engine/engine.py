"""The engine: requests in, events out, one forward pass a step over whatever is running.

    schedule → run → sample → emit

It has a thread of its own. Other threads put commands into a queue; everything else belongs to the engine's thread.
"""

import logging
import math
import queue
import secrets
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from patchclamp_server.callers import CALLER
from patchclamp_server.engine.access import EngineAccess, OpenEngine
from patchclamp_server.engine.admission import Admission, Demand, Refusal
from patchclamp_server.engine.batch import Executor
from patchclamp_server.engine.config import EngineConfig, EngineObserver, EngineStats, Unobserved
from patchclamp_server.engine.faults import fault_of, is_device_lost, is_out_of_memory
from patchclamp_server.engine.kv_cache import KvCache
from patchclamp_server.engine.operator_executor import OperatorExecutor
from patchclamp_server.engine.output import Output
from patchclamp_server.engine.quality_guard import divergences
from patchclamp_server.engine.request import Failed, FinishReason, Priority, Request
from patchclamp_server.engine.runner import Prediction, Runner, StepResult
from patchclamp_server.engine.sampler import NOT_FINITE, sample
from patchclamp_server.engine.scheduler import Scheduler, Work
from patchclamp_server.engine.sequence import Sequence
from patchclamp_server.engine.sparse_sequence import SparseSequence
from patchclamp_server.engine.text import IncrementalDetokenizer, StopChecker, token_bytes
from patchclamp_server.errors import (
    Aborted,
    Cancelled,
    DeadlineExceeded,
    EngineFailure,
    InvalidArgument,
    NotFound,
    RequestError,
    ResourceExhausted,
    Unavailable,
)
from patchclamp_server.interventions.observers import CaptureState
from patchclamp_server.interventions.scopes import SequenceTokens
from patchclamp_server.interventions.state import ProgramState
from patchclamp_server.model.load import LoadedModel
from patchclamp_server.monitoring.registry import WatchRegistry
from patchclamp_server.sparsity.mlp import SparseModel

log = logging.getLogger(__name__)


class Engine:
    """Runs requests of one model. Start it, submit requests, and shut it down."""

    def __init__(self, model: LoadedModel, config: EngineConfig | None = None) -> None:
        self.model = model
        self.config = config or EngineConfig()
        # A tokenizer that cannot be decoded token by token is refused here, not at the first request.
        token_bytes(model.tokenizer)
        spec = model.decoder.spec
        self.cache = KvCache(
            n_layers=spec.n_layers,
            n_blocks=self.config.kv_cache_tokens // self.config.kv_block_size + 1,
            block_size=self.config.kv_block_size,
            n_kv_heads=spec.n_kv_heads,
            head_dim=spec.head_dim,
            dtype=model.decoder.dtype,
            device=model.decoder.device,
            share_prefixes=self.config.enable_prefix_cache,
        )
        self.scheduler = Scheduler(
            self.cache,
            max_sequences=self.config.max_sequences,
            max_tokens=self.config.max_tokens_per_step,
            expected_length=self._expected_length,
            is_late=lambda sequence: self._late(sequence) is not None,
        )
        self.admission = Admission(
            max_waiting=self.config.max_waiting,
            max_sequences=self.config.max_sequences,
            max_kv_tokens=self.config.max_waiting_kv_tokens or 8 * self.config.kv_cache_tokens,
        )
        # What sparse policies are bound to; one for all requests.
        self.sparse_model = SparseModel(model.info.fingerprint, model.decoder)
        self.executor = _executor(self.sparse_model, self.cache, self.config)
        self.tables = self.executor.tables
        self.monitor = WatchRegistry(
            spec,
            model.decoder.device,
            max_watches=self.config.max_watches,
            max_items=self.config.max_watched_items,
        )
        self.runner = Runner(self.executor, self.cache, self.monitor)
        self.observer: EngineObserver = Unobserved()
        self.access: EngineAccess = OpenEngine()
        # Called with every row of logits that is sampled from (request id, position it predicts, logits [vocab]).
        self.on_logits: Callable[[int, int, Tensor], None] | None = None
        # Called on the engine's thread when it ends, by `shutdown` or by `failure`: nothing will run any more.
        self.on_stopped: Callable[[], None] | None = None
        # What ended the engine, unless `shutdown` did.
        self.failure: BaseException | None = None
        self._commands: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()
        self._wake = threading.Event()
        self._lock = threading.Lock()
        self._idle = threading.Condition(self._lock)
        # Requests that have not had their last event, by id; shared with other threads under the lock.
        self._requests: dict[int, Request] = {}
        self._sequences: dict[int, Sequence] = {}
        self._next_id = 1
        self._draining = False
        self._stopping = False
        self._thread = threading.Thread(target=self._loop, name="patchclamp-engine", daemon=True)
        self._steps = self._prefill_tokens = self._decode_tokens = 0
        self._failed_steps = 0  # in a row
        self._all_failed_steps = 0
        self._step_started: float | None = None

    def start(self) -> None:
        self._thread.start()

    def submit(self, request: Request) -> int:
        """Queues a request and returns its id.

        Raises InvalidArgument for a prompt that cannot run, ResourceExhausted when the queue is full or the deadline
        would not be met, Unavailable while draining, PermissionDenied when `access` says so.
        """
        self._check(request)
        request = self.access.admit(request)
        demand = self._demand(request)
        if request.sparsity is not None:
            # Here, and not on the engine's thread, where everybody would wait for it the first time.
            self.executor.sparse.prepare()
        with self._lock:
            if self._draining or self._stopping:
                raise Unavailable("", "the engine has stopped")
            arrival = time.monotonic()
            seconds_left = None if request.deadline is None else request.deadline - arrival
            refusal = self.admission.check(demand, seconds_left)
            if refusal is None:
                request_id = self._next_id
                self._next_id += 1
                self._requests[request_id] = request
                self.admission.enter(request_id, demand)
        if refusal is not None:
            raise self._refused(refusal)
        self.access.admitted(request)
        self._do(lambda: self._add(request_id, request, arrival))
        return request_id

    def check_room(self) -> None:
        """Raises ResourceExhausted when the queue is full for the caller of this context, whatever it would submit.

        Cheap: to be asked before a request is prepared, which is work, and most of the work of refusing it.
        """
        with self._lock:
            refusal = self.admission.check(Demand(CALLER.get(), Priority.INTERACTIVE))
        if refusal is not None:
            raise self._refused(refusal)

    def wake(self) -> None:
        """Something that held a request back is over."""
        self._wake.set()

    def cancel(self, request_id: int) -> None:
        """Ends a request with Failed(Cancelled); nothing happens when it has ended."""
        self._do(lambda: self._fail_id(request_id, Cancelled("", "the request was cancelled")))

    def finish(self, request_id: int) -> None:
        """Ends a request as if it had reached its last token."""
        self._do(lambda: self._finish_id(request_id))

    def set_strength(self, request_id: int, edit: str, strength: float) -> None:
        """Changes the strength of a named edit for the next token on. Raises NotFound for an unknown name."""
        with self._lock:
            request = self._requests.get(request_id)
        names = [e.name for e in request.program.edits] if request is not None and request.program is not None else []
        if edit not in names:
            raise NotFound("set_strength.edit", f"the program has no edit named {edit!r}")
        self.access.set_strength(edit, strength)
        self._do(lambda: self._set_strength(request_id, edit, strength))

    def advance(self, request_id: int, tokens: int) -> None:
        """Grants a request with credits that many more tokens."""
        self._do(lambda: self._advance(request_id, tokens))

    def drain(self, timeout_seconds: float) -> bool:
        """Refuses new requests and waits for the others. True when none is left."""
        with self._lock:
            self._draining = True
            return self._idle.wait_for(lambda: not self._requests, timeout=timeout_seconds)

    def shutdown(self, timeout_seconds: float | None = None) -> bool:
        """Stops the thread; what still runs ends with Failed(Unavailable). False when a step did not end in time."""
        with self._lock:
            self._stopping = True
        self._wake.set()
        if self._thread.is_alive():
            self._thread.join(timeout_seconds)
        return not self._thread.is_alive()

    def step_seconds(self) -> float:
        """How long the step has been running that runs now; 0 between steps. From any thread."""
        started = self._step_started
        return 0.0 if started is None else time.monotonic() - started

    def stats(self) -> EngineStats:
        return EngineStats(
            running=len(self.scheduler.running),
            waiting=len(self.scheduler.waiting),
            kv_blocks_total=self.cache.n_blocks,
            kv_blocks_free=self.cache.n_free,
            kv_blocks_cached=self.cache.n_cached,
            steps=self._steps,
            prefill_tokens=self._prefill_tokens,
            decode_tokens=self._decode_tokens,
            prefix_hit_tokens=self.scheduler.prefix_hit_tokens,
            preemptions=self.scheduler.preemptions,
            failed_steps=self._all_failed_steps,
            program_rows=self.tables.n_held,
            queue_kv_tokens=self.admission.kv_tokens,
        )

    def _check(self, request: Request) -> None:
        context = self.model.info.context_length
        length = len(request.tokens)
        if not length:
            raise InvalidArgument("prompt", "the prompt is empty")
        if length > context:
            raise InvalidArgument("prompt", f"{length} tokens are more than the context of {context}")
        longest = self._longest(request)
        room = self.cache.n_blocks * self.config.kv_block_size
        if longest > room:
            raise InvalidArgument(
                "prompt", f"prompt and max_tokens need {longest} tokens of KV cache, which has {room}"
            )
        if request.score_from is not None and not 1 <= request.score_from < length:
            raise InvalidArgument("continuation", "scoring needs at least one prompt token and one continuation token")
        if request.score_from is not None and request.sparsity is not None and request.sparsity.guard is not None:
            raise InvalidArgument("sparsity.guard", "a guard watches generation; scoring has none")

    def _longest(self, request: Request) -> int:
        """Tokens it may come to have."""
        generated = 0 if request.score_from is not None else request.stop.max_tokens
        return min(len(request.tokens) + generated, self.model.info.context_length)

    def _demand(self, request: Request) -> Demand:
        longest = self._longest(request)
        return Demand(
            request.caller,
            request.priority,
            kv_tokens=2 * longest if request.compare_baseline else longest,
            prompt_tokens=len(request.tokens),
            max_tokens=longest - len(request.tokens),
            may_stop_early=_may_stop_early(request),
        )

    def _refused(self, refusal: Refusal) -> ResourceExhausted:
        self.observer.on_refused(refusal.reason)
        error = ResourceExhausted("", refusal.message)
        error.retry_after_seconds = refusal.retry_after_seconds
        return error

    # What follows runs on the engine's thread.

    def _late(self, sequence: Sequence) -> Refusal | None:
        """Why it need not start any more, where that is so."""
        deadline = sequence.request.deadline
        if deadline is None or sequence.leader is not None:
            return None
        return self.admission.check_start(self._demand(sequence.request), deadline - time.monotonic())

    def _expected_length(self, sequence: Sequence) -> int:
        """Tokens that a sequence is expected to have in the end."""
        most = self._longest(sequence.request) - sequence.prompt_length
        expected = self.admission.expected_tokens(most, may_stop_early=_may_stop_early(sequence.request))
        return max(len(sequence.tokens), sequence.prompt_length + math.ceil(expected))

    def _do(self, command: Callable[[], None]) -> None:
        self._commands.put(command)
        self._wake.set()

    def step(self) -> bool:
        """Takes commands in, and runs one step. False when nothing can run. For the engine's thread, or a test."""
        self._step_started = time.monotonic()
        try:
            self._obey()
            preemptions = self.scheduler.preemptions
            work = self.scheduler.schedule()
            for _ in range(self.scheduler.preemptions - preemptions):
                self.observer.on_preemption()
            for sequence in self.scheduler.late:
                if (refusal := self._late(sequence)) is not None:
                    self._fail(sequence, self._refused(refusal))
            started = list(self.scheduler.started)
            for sequence in started:
                self.observer.on_queue_wait((sequence.admitted_at or sequence.arrival) - sequence.arrival)
            with self._lock:
                self.admission.on_step([s.id for s in started], time.monotonic(), contended=self.scheduler.contended)
            if work:
                self._step(work)
            return bool(work)
        finally:
            self._step_started = None

    def _obey(self) -> None:
        """Takes in what other threads have asked for."""
        while not self._commands.empty():
            self._commands.get()()

    def _loop(self) -> None:
        try:
            while True:
                # In this order: who sets `_stopping` wakes the loop after it, and a wake that is cleared has been seen.
                self._wake.clear()
                if self._stopping:
                    # What was cancelled before that ends as cancelled.
                    self._obey()
                    break
                timeout = self._expire()
                if not self.step():
                    self._wake.wait(timeout)
        except BaseException as error:
            log.critical("the engine stopped on a defect", exc_info=True)
            self.failure = error
        finally:
            with self._lock:
                self._stopping = True
            if self.on_stopped is not None:
                self.on_stopped()
            self.monitor.close()
            # Those among the commands too, which nothing can run any more: the device may be lost.
            for request_id, request in list(self._requests.items()):
                self._end_failed(request_id, request, Unavailable("", "the engine has stopped"))

    def _add(self, request_id: int, request: Request, arrival: float) -> None:
        try:
            self._enter(request_id, request, arrival)
        except Exception as error:
            log.exception("request %d could not be taken in", request_id)
            if is_device_lost(error):
                raise
            self._end_failed(request_id, request, fault_of(error))

    def _enter(self, request_id: int, request: Request, arrival: float) -> None:
        prompt_length = len(request.tokens) if request.score_from is None else request.score_from
        capture = None
        if request.capture is not None:
            width = self.model.decoder.spec.sites[request.capture.site]
            layers = request.capture.layers
            values = torch.zeros(len(layers), width, dtype=self.model.decoder.dtype, device=self.model.decoder.device)
            capture = CaptureState(layers, values)
        sequence = Sequence(
            id=request_id,
            request=request,
            seed=secrets.randbits(63) if request.sampling.seed is None else request.sampling.seed,
            state=None,
            capture=capture,
            output=Output(
                IncrementalDetokenizer(self.model.tokenizer),
                StopChecker(request.stop.strings, request.stop.include_stop_string),
                frozenset() if request.stop.ignore_eos else self.model.eos_token_ids,
            ),
            prompt_length=prompt_length,
            arrival=arrival,
            tokens=list(request.tokens),
            credits=request.credits,
        )
        if request.sparsity is not None:
            sequence.sparse = SparseSequence.of(request.sparsity, request.program, prompt_length)
        if request.program is not None and (
            request.program.edits or request.program.readouts or request.program.aborts
        ):
            tokens = SequenceTokens(prompt_length, request.roles)
            loaded = self.tables.load(request.program)
            try:
                sequence.state = ProgramState(request_id, request.program, tokens, loaded)
            except BaseException:
                self.tables.release(loaded)
                raise
        self._sequences[request_id] = sequence
        self.scheduler.add(sequence)
        if request.compare_baseline:
            # Shares the list of tokens: it runs along whatever the leader generates.
            sequence.follower = Sequence(
                id=request_id,
                request=Request(
                    request.tokens, on_event=lambda event: None, priority=request.priority, caller=request.caller
                ),
                seed=0,
                state=None,
                capture=None,
                output=None,
                prompt_length=prompt_length,
                arrival=arrival,
                tokens=sequence.tokens,
                leader=sequence,
            )
            self.scheduler.add(sequence.follower)

    def _set_strength(self, request_id: int, edit: str, strength: float) -> None:
        sequence = self._sequences.get(request_id)
        if sequence is None or sequence.state is None:
            return
        sequence.state.set_strength(edit, strength, sequence.computed)
        del sequence.keys[sequence.computed // self.config.kv_block_size :]

    def _advance(self, request_id: int, tokens: int) -> None:
        sequence = self._sequences.get(request_id)
        if sequence is not None and sequence.credits is not None:
            sequence.credits += tokens

    def _expire(self) -> float | None:
        """Fails what is past its deadline; seconds until the next one."""
        now = time.monotonic()
        nearest = None
        for sequence in list(self._sequences.values()):
            deadline = sequence.request.deadline
            if deadline is None:
                continue
            if deadline <= now:
                self._fail(sequence, DeadlineExceeded("", "the deadline passed before the request was finished"))
            else:
                nearest = min(deadline - now, nearest or deadline - now)
        return nearest

    def _step(self, work: list[Work]) -> None:
        try:
            self._run(work)
        except Exception as error:
            # Out of memory, or a defect: the requests of this step are lost, the engine is not.
            log.exception("a step of %d sequences failed", len(work))
            self._failed_steps += 1
            self._all_failed_steps += 1
            if is_device_lost(error) or self._failed_steps >= self.config.max_failed_steps:
                raise
            self._give_up(work, fault_of(error))
            emptied = is_out_of_memory(error)
        else:
            self._failed_steps = 0
            return
        if emptied and self.model.decoder.device.type == "cuda":
            # After the `except`, whose traceback holds the tensors of the step.
            torch.cuda.empty_cache()

    def _give_up(self, work: list[Work], failure: RequestError) -> None:
        """Fails the sequences of a step that was not finished."""
        size = self.config.kv_block_size
        # It may have written what is not finite.
        self.cache.scrub([b for w in work for b in w.sequence.blocks[w.sequence.computed // size :]])
        for item in work:
            self._fail_id(item.sequence.id, failure)

    @contextmanager
    def _concerning(self, sequence: Sequence) -> Iterator[None]:
        """What concerns one request alone: an exception inside fails that request and no other."""
        try:
            yield
        except Exception as error:
            log.exception("request %d failed", sequence.id)
            if is_device_lost(error):
                raise
            self._fail(sequence, fault_of(error))

    def _run(self, work: list[Work]) -> None:
        started = time.monotonic()
        result = self.runner.run(work)
        for item, position in result.broken:
            self._break(item, position)
        self.scheduler.finish_step([w for w in work if w.sequence.id in self._sequences])
        self._steps += 1
        decode_rows = sum(w.n for w in work if w.n == 1)
        self._decode_tokens += decode_rows
        prefill_tokens = sum(w.n for w in work if w.n > 1)
        self._prefill_tokens += prefill_tokens
        self._sample_densely(result)
        self._deliver(work, result)
        self.observer.on_step(
            seconds=time.monotonic() - started, prefill_tokens=prefill_tokens, decode_rows=decode_rows
        )

    def _break(self, item: Work, position: int) -> None:
        """Fails a sequence whose activations overflowed, and cleans the blocks it wrote."""
        sequence, size = item.sequence, self.config.kv_block_size
        self.cache.scrub(sequence.blocks[sequence.computed // size :])
        message = f"activations are not finite at position {position}"
        if sequence.state is not None and sequence.state.bound.edits:
            self._fail_id(sequence.id, InvalidArgument("program.edits", f"{message}: an edit is too strong"))
        else:
            self._fail_id(sequence.id, EngineFailure("", message))

    def _sample_densely(self, result: StepResult) -> None:
        """Quality guards: computes the tokens that are due densely too, and ends sparse inference that has drifted."""
        due = [p for p in result.predictions if p.sequence.id in self._sequences and self._guard_is_due(p)]
        if not due:
            return
        try:
            dense = self.runner.run_densely([p.sequence for p in due])
        except Exception as error:
            log.exception("dense samples of %d sequences failed", len(due))
            for prediction in due:
                failure = EngineFailure("", f"the quality guard failed: {type(error).__name__}")
                self._fail_id(prediction.sequence.id, failure)
            return
        found = divergences(dense, result.logits[[p.row for p in due]])
        for prediction, (divergence, same) in zip(due, found, strict=True):
            sparse = prediction.sequence.sparse
            assert sparse is not None
            assert sparse.guard is not None
            self.observer.on_guard_sample(sparse.asked.policy, divergence)
            if sparse.guard.add(divergence, same):
                sparse.dense_from = prediction.position + 1
                self.observer.on_sparse_fallback(sparse.asked.policy)

    def _guard_is_due(self, prediction: Prediction) -> bool:
        sequence, sparse = prediction.sequence, prediction.sequence.sparse
        if sparse is None or sparse.guard is None or not sparse.is_sparse(prediction.position):
            return False
        return sparse.guard.is_due(prediction.position - sequence.prompt_length)

    def _deliver(self, work: list[Work], result: StepResult) -> None:
        for uid, value in result.outcome.readouts:
            if uid in self._sequences:
                self._sequences[uid].output_or_fail().collect(value)
        for sequence in {w.sequence.id: w.sequence for w in work if w.sequence.leader is None}.values():
            if sequence.id in self._sequences:
                with self._concerning(sequence):
                    sequence.output_or_fail().emit_readouts(sequence.request.on_event)
        for hit in result.outcome.aborts:
            if hit.uid in self._sequences:
                where = f"condition {hit.name!r} held at position {hit.position}"
                self._fail_id(hit.uid, Aborted("program.abort_when", where))
        drawn = []
        for prediction in result.predictions:
            sequence = prediction.sequence
            if sequence.id not in self._sequences:
                continue
            if sequence.leader is not None:
                with self._concerning(sequence.leader):
                    sequence.leader.compare(prediction.position, result.logits[prediction.row])
            elif sequence.scores:
                with self._concerning(sequence):
                    sequence.score(prediction.position, result.logits[prediction.row])
            elif sequence.request.stop.max_tokens > 0:
                drawn.append(prediction)
        if drawn:
            rows = [p.row for p in drawn]
            logits = result.logits if len(rows) == len(result.logits) else result.logits[rows]
            sampled = sample(logits, [p.sequence.sampling_row for p in drawn])
            for i, (prediction, choice) in enumerate(zip(drawn, sampled, strict=True)):
                sequence = prediction.sequence
                if choice.id == NOT_FINITE:
                    self._fail(
                        sequence, EngineFailure("", f"the logits after position {prediction.position} are not finite")
                    )
                    continue
                if self.on_logits is not None:
                    self.on_logits(sequence.id, len(sequence.tokens), logits[i])
                if sequence.follower is not None:
                    sequence.predictions[len(sequence.tokens)] = torch.log_softmax(logits[i].double(), dim=0)
                self._observe_token(sequence)
                with self._concerning(sequence):
                    if (reason := sequence.accept(choice, self.model.info.context_length)) is not None:
                        self._finish(sequence, reason)
        self._end_computed(work)

    def _end_computed(self, work: list[Work]) -> None:
        """Ends sequences that sample nothing and have computed all they need."""
        for item in work:
            sequence = item.sequence
            if sequence.id not in self._sequences or sequence.remaining > 0:
                continue
            if sequence.leader is not None:
                if sequence.leader.ended is not None:
                    self._complete(sequence.leader, sequence.leader.ended)
            elif sequence.scores or sequence.request.stop.max_tokens == 0:
                self._finish(sequence, FinishReason.LENGTH)

    def _observe_token(self, sequence: Sequence) -> None:
        now = time.monotonic()
        if sequence.last_token_at is None:
            sequence.first_token_at = now
            self.observer.on_first_token(now - sequence.arrival)
        else:
            self.observer.on_inter_token(now - sequence.last_token_at)
        sequence.last_token_at = now

    def _finish_id(self, request_id: int) -> None:
        sequence = self._sequences.get(request_id)
        if sequence is not None and sequence.ended is None:
            self._finish(sequence, FinishReason.CLIENT)

    def _finish(self, sequence: Sequence, reason: FinishReason) -> None:
        """Ends a sequence, once its follower has caught up."""
        sequence.ended = reason
        self.scheduler.remove(sequence)
        if sequence.follower is None or sequence.follower.remaining <= 0:
            self._complete(sequence, reason)

    def _complete(self, sequence: Sequence, reason: FinishReason) -> None:
        with self._concerning(sequence):
            receipt = None
            if sequence.state is not None:
                receipt = sequence.state.receipt(self.tables.read(sequence.state.loaded))
            self._release(sequence)
            self._measure(sequence)
            sequence.emit_finished(reason, receipt)
        if sequence.id in self._requests:
            self._leave(sequence, reason.value)

    def _measure(self, sequence: Sequence) -> None:
        """What admission learns from a request that has run to its end."""
        now = time.monotonic()
        generated_from = sequence.first_token_at or now
        request = sequence.request
        with self._lock:
            self.admission.on_finished(
                self._demand(request),
                generated=len(sequence.output_ids),
                prefill_seconds=generated_from - (sequence.admitted_at or sequence.arrival),
                decode_seconds=now - generated_from,
                paced=request.credits is not None or bool(sequence.preempted_at),
            )

    def _fail_id(self, request_id: int, error: RequestError) -> None:
        sequence = self._sequences.get(request_id)
        if sequence is not None:
            self._fail(sequence, error)

    def _fail(self, sequence: Sequence, error: RequestError) -> None:
        self._release(sequence)
        _tell(sequence.request, sequence.failed(error))
        self._leave(sequence, _outcome(error))

    def _end_failed(self, request_id: int, request: Request, error: RequestError) -> None:
        """Fails a request, whether it has a sequence or not."""
        if request_id in self._sequences:
            self._fail(self._sequences[request_id], error)
            return
        _tell(request, Failed(error))
        self._forget(request_id, _outcome(error))

    def _release(self, sequence: Sequence) -> None:
        """Gives back all that a sequence holds; nothing when that has been done."""
        if self._sequences.pop(sequence.id, None) is None:
            return
        self.scheduler.remove(sequence)
        if sequence.follower is not None:
            self.scheduler.remove(sequence.follower)
        if sequence.state is not None:
            self.tables.release(sequence.state.loaded)

    def _leave(self, sequence: Sequence, outcome: str) -> None:
        """After the last event."""
        if sequence.sparse is not None:
            self.observer.on_sparse_finished(sequence.sparse.report(sequence.computed))
        self._forget(sequence.id, outcome)

    def _forget(self, request_id: int, outcome: str) -> None:
        try:
            self.observer.on_finished(outcome)
        finally:
            with self._lock:
                del self._requests[request_id]
                self.admission.leave(request_id)
                self._idle.notify_all()


def _may_stop_early(request: Request) -> bool:
    stop, program = request.stop, request.program
    aborts = program is not None and bool(program.aborts)
    return not stop.ignore_eos or bool(stop.strings or stop.token_ids) or aborts or request.credits is not None


def _tell(request: Request, failed: Failed) -> None:
    """The last event of a request. Nobody is left to be told when that fails."""
    try:
        request.on_event(failed)
    except Exception:
        log.exception("a request could not be told that it failed")


def _outcome(error: RequestError) -> str:
    return _snake(type(error).__name__)


def _executor(model: SparseModel, cache: KvCache, config: EngineConfig) -> Executor:
    kernels = model.decoder.device.type == "cuda" if config.kernels is None else config.kernels
    if not kernels:
        return OperatorExecutor(model, cache)
    # Triton is not needed, and takes a second to import, where no kernel runs.
    from patchclamp_server.engine.kernel_executor import KernelExecutor

    return KernelExecutor(model, cache, config)


def _snake(name: str) -> str:
    return "".join("_" + c.lower() if c.isupper() else c for c in name).lstrip("_")
