"""The engine takes requests in and sends events out, with one forward pass a step (steps.py) over whatever is running.

It has a thread of its own. Other threads put commands into a queue; everything else belongs to the engine's thread.
"""

import logging
import queue
import threading
import time
from collections.abc import Callable
from functools import partial

import torch

from patchclamp_server.callers import CALLER
from patchclamp_server.engine.access import EngineAccess, OpenEngine
from patchclamp_server.engine.admission import Admission, Demand
from patchclamp_server.engine.batch import Executor
from patchclamp_server.engine.config import EngineConfig, EngineObserver, EngineStats
from patchclamp_server.engine.delivery import Delivery, OnLogits
from patchclamp_server.engine.exclusive import E, Entry, ExclusiveDoor, Work
from patchclamp_server.engine.executors.operator_executor import OperatorExecutor
from patchclamp_server.engine.intake import Intake
from patchclamp_server.engine.kv_cache import KvCache
from patchclamp_server.engine.live import LiveRequests
from patchclamp_server.engine.memory.on_top import admit_sparse_weights
from patchclamp_server.engine.request import Priority, Request
from patchclamp_server.engine.runner import Runner
from patchclamp_server.engine.sampler import warm_up
from patchclamp_server.engine.scheduler import Scheduler
from patchclamp_server.engine.steps import Steps
from patchclamp_server.errors import Cancelled, DeadlineExceeded, NotFound, Unavailable
from patchclamp_server.model.attention.pools import KV_DTYPES
from patchclamp_server.model.decoder import Decoder
from patchclamp_server.model.load import LoadedModel
from patchclamp_server.monitoring.registry import WatchRegistry
from patchclamp_server.sparsity.mlp import SparseModel
from patchclamp_server.text.detokenize import token_bytes
from patchclamp_server.threads import pin

log = logging.getLogger(__name__)


class Engine:
    """Runs requests of one model. Start it, submit requests, and shut it down."""

    def __init__(self, model: LoadedModel, config: EngineConfig | None = None) -> None:
        self.model = model
        self.config = config or EngineConfig()
        if self.config.batch_invariant not in (None, model.decoder.batch_invariant):
            raise ValueError(f"batch_invariant: the model was loaded for {model.decoder.batch_invariant}")
        # A tokenizer that cannot be decoded token by token is refused here, not at the first request.
        token_bytes(model.tokenizer)
        spec = model.decoder.spec
        self.cache = KvCache(
            n_layers=spec.n_layers,
            n_blocks=self.config.kv_cache_tokens // self.config.kv_block_size + 1,
            block_size=self.config.kv_block_size,
            n_kv_heads=spec.n_kv_heads,
            head_dim=spec.head_dim,
            dtype=kv_dtype(self.config, model.decoder),
            device=model.decoder.device,
            tiled=model.decoder.reads_tiles and not _runs_kernels(model.decoder, self.config),
            share_prefixes=self.config.enable_prefix_cache,
        )
        self.admission = Admission(
            max_waiting=self.config.max_waiting,
            max_sequences=self.config.max_sequences,
            max_kv_tokens=self.config.max_waiting_kv_tokens or 8 * self.config.kv_cache_tokens,
        )
        # Sparse policies are bound to this one model, for all requests.
        self.sparse_model = SparseModel(
            model.info.fingerprint,
            model.decoder,
            admit=partial(admit_sparse_weights, device=str(model.decoder.device)),
        )
        self.executor = _executor(self.sparse_model, self.cache, self.config)
        self.tables = self.executor.tables
        kv_tokens = self.cache.n_blocks * self.config.kv_block_size
        self.intake = Intake(model, self.tables, self.admission, kv_tokens)
        self.scheduler = Scheduler(
            self.cache,
            max_sequences=self.config.max_sequences,
            max_tokens=self.config.max_tokens_per_step,
            expected_length=self.intake.expected_length,
            is_late=lambda sequence: self.intake.late(sequence) is not None,
            analysis_slowdown=self.config.analysis_slowdown,
        )
        self.live = LiveRequests(self.intake, self.scheduler, self.tables, self.admission)
        self.monitor = WatchRegistry(
            spec,
            model.decoder.device,
            max_watches=self.config.max_watches,
            max_items=self.config.max_watched_items,
        )
        self.runner = Runner(self.executor, self.cache, self.monitor, model.decoder.dtype)
        self.delivery = Delivery(self.live, self.runner, model.decoder, model.info.context_length)
        self.access: EngineAccess = OpenEngine()
        self.exclusive = ExclusiveDoor(model.decoder.device, lambda tokens: self.access.compute(tokens))
        self.steps = Steps(
            model,
            self.config,
            intake=self.intake,
            scheduler=self.scheduler,
            live=self.live,
            runner=self.runner,
            delivery=self.delivery,
            exclusive=self.exclusive,
        )
        self.on_logits: OnLogits | None = None
        # This is called on the engine's thread when it ends, by `shutdown` or by `failure`: nothing will run any more.
        self.on_stopped: Callable[[], None] | None = None
        # This exception ended the engine, unless `shutdown` did.
        self.failure: BaseException | None = None
        self._commands: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()
        self._wake = threading.Event()
        self._stopping = False
        self._thread = threading.Thread(target=self._loop, name="patchclamp-engine", daemon=True)
        self._step_started: float | None = None

    @property
    def observer(self) -> EngineObserver:
        return self.live.observer

    @observer.setter
    def observer(self, observer: EngineObserver) -> None:
        self.live.observer = observer

    def start(self) -> None:
        warm_up(self.model.decoder.device)
        self.cache.warm_up()
        self._thread.start()

    def submit(self, request: Request) -> int:
        """Queues a request and returns its id.

        Raises InvalidArgument for a prompt that cannot run, ResourceExhausted when the queue is full or the deadline
        would not be met, Unavailable while draining, PermissionDenied when `access` says so.
        """
        self.intake.check(request)
        request = self.access.admit(request)
        if request.sparsity is not None:
            # This happens here, and not on the engine's thread, where everybody would wait for it the first time.
            self.executor.sparse.prepare(request.sparsity.selector)
        arrival = time.monotonic()
        request_id = self.live.admit(request, arrival)
        self.access.admitted(request)
        self._do(lambda: self.live.take_in(request_id, request, arrival))
        return request_id

    def check_room(self) -> None:
        """Raises ResourceExhausted when the queue is full for the caller of this context, whatever it would submit.

        This is cheap: it can be asked before a request is prepared, which is most of the work of refusing it.
        """
        self.live.check_room(Demand(CALLER.get(), Priority.INTERACTIVE))

    def enter(
        self,
        work: Work[E],
        on_event: Callable[[E], None],
        on_end: Callable[[BaseException | None], None],
        is_held: Callable[[], bool] = lambda: False,
    ) -> Entry:
        """Queues a work for the engine's thread (exclusive.py), in the context of the caller. Who lets go of one that
        was held calls `wake`.

        Raises ResourceExhausted where an analysis request would be refused, and Unavailable while draining.
        """
        self.live.check_room(Demand(CALLER.get(), Priority.ANALYSIS))
        entry = self.exclusive.enter(work, on_event, on_end, is_held)
        self._wake.set()
        return entry

    def leave(self, entry: Entry) -> None:
        """Ends a work with Cancelled after the slice that runs; nothing happens when it has ended."""
        self._do(lambda: self.exclusive.leave(entry))

    def wake(self) -> None:
        """Wakes the engine when something that held a request back is over."""
        self._wake.set()

    def cancel(self, request_id: int) -> None:
        """Ends a request with Failed(Cancelled); nothing happens when it has ended."""
        self._do(lambda: self.live.fail_id(request_id, Cancelled("", "the request was cancelled")))

    def finish(self, request_id: int) -> None:
        """Ends a request as if it had reached its last token."""
        self._do(lambda: self.live.finish_id(request_id))

    def set_strength(self, request_id: int, edit: str, strength: float) -> None:
        """Changes the strength of a named edit for the next token on. Raises NotFound for an unknown name."""
        request = self.live.get(request_id)
        names = [e.name for e in request.program.edits] if request is not None and request.program is not None else []
        if edit not in names:
            raise NotFound("set_strength.edit", f"the program has no edit named {edit!r}")
        self.access.set_strength(edit, strength)
        self._do(lambda: self._set_strength(request_id, edit, strength))

    def advance(self, request_id: int, tokens: int) -> None:
        """Grants a request with credits that many more tokens."""
        self._do(lambda: self._advance(request_id, tokens))

    def drain(self, timeout_seconds: float) -> bool:
        """Refuses new requests and works, and waits for the others. Returns True when none is left."""
        self.live.close()
        self.exclusive.close()
        until = time.monotonic() + timeout_seconds
        idle = self.live.wait_until_idle(timeout_seconds)
        return self.exclusive.wait_until_idle(max(0.0, until - time.monotonic())) and idle

    def shutdown(self, timeout_seconds: float | None = None) -> bool:
        """Stops the thread; what still runs ends with Failed(Unavailable). Returns False when a step did not end in
        time."""
        self.live.close()
        self.exclusive.close()
        self._stopping = True
        self._wake.set()
        if self._thread.is_alive():
            self._thread.join(timeout_seconds)
        return not self._thread.is_alive()

    def step_seconds(self) -> float:
        """Returns how long the current step has been running, or 0 between steps. Any thread may call it."""
        started = self._step_started
        return 0.0 if started is None else time.monotonic() - started

    def stats(self) -> EngineStats:
        return EngineStats(
            running=len(self.scheduler.running),
            waiting=len(self.scheduler.waiting),
            kv_blocks_total=self.cache.n_blocks,
            kv_blocks_free=self.cache.n_free,
            kv_blocks_cached=self.cache.n_cached,
            steps=self.steps.n,
            prefill_tokens=self.steps.prefill_tokens,
            decode_tokens=self.delivery.generated_tokens,
            scored_tokens=self.delivery.scored_tokens,
            recomputed_tokens=self.steps.recomputed_tokens,
            prefix_hit_tokens=self.scheduler.prefix_hit_tokens,
            preemptions=self.scheduler.preemptions,
            failed_steps=self.steps.failed,
            program_rows=self.tables.n_held,
            queue_kv_tokens=self.admission.kv_tokens,
        )

    # The engine's thread runs what follows.

    def _do(self, command: Callable[[], None]) -> None:
        self._commands.put(command)
        self._wake.set()

    def step(self) -> bool:
        """Takes commands in, and runs one step. Returns False when nothing can run. For the engine's thread, or a
        test."""
        self._step_started = time.monotonic()
        try:
            self._obey()
            return self.steps.run(self.on_logits)
        finally:
            self._step_started = None

    def _obey(self) -> None:
        """Takes in what other threads have asked for."""
        while not self._commands.empty():
            self._commands.get()()

    def _loop(self) -> None:
        pin(0)
        try:
            while True:
                # This order matters: who sets `_stopping` wakes the loop after it, and a wake that is cleared has been
                # seen.
                self._wake.clear()
                if self._stopping:
                    # What was cancelled before that ends as cancelled.
                    self._obey()
                    break
                self._expire()
                if not self.step():
                    # Deadlines are asked again: the step has taken in requests that may wait for nothing but theirs.
                    self._wake.wait(self._expire())
        except BaseException as error:
            log.critical("the engine stopped on a defect", exc_info=True)
            self.failure = error
        finally:
            self._stopping = True
            self.live.close()
            if self.on_stopped is not None:
                self.on_stopped()
            self.monitor.close()
            self.exclusive.end_all(Unavailable("", "the engine has stopped"))
            # Requests among the commands fail too, since nothing can run them any more: the device may be lost.
            self.live.fail_all(Unavailable("", "the engine has stopped"))

    def _set_strength(self, request_id: int, edit: str, strength: float) -> None:
        sequence = self.live.sequences.get(request_id)
        if sequence is None or sequence.state is None:
            return
        sequence.state.set_strength(edit, strength, sequence.computed)
        del sequence.keys[sequence.computed // self.config.kv_block_size :]

    def _advance(self, request_id: int, tokens: int) -> None:
        sequence = self.live.sequences.get(request_id)
        if sequence is not None and sequence.credits is not None:
            sequence.credits += tokens

    def _expire(self) -> float | None:
        """Fails what is past its deadline, and returns the seconds until the next deadline."""
        deadlines, now = self.live.deadlines, time.monotonic()
        nearest = min(deadlines.values(), default=None)
        if nearest is not None and nearest <= now:
            for request_id in [id for id, deadline in deadlines.items() if deadline <= now]:
                error = DeadlineExceeded("", "the deadline passed before the request was finished")
                self.live.fail_id(request_id, error)
            nearest = min(deadlines.values(), default=None)
        return None if nearest is None else nearest - now


def kv_dtype(config: EngineConfig, decoder: Decoder) -> torch.dtype:
    """Returns the dtype of keys and values. Raises ValueError where the decoder cannot read what is asked for."""
    if config.kv_dtype in ("model", str(decoder.dtype).removeprefix("torch.")):
        return decoder.dtype
    wanted = KV_DTYPES.get(config.kv_dtype)
    if wanted is None or not decoder.reads_tiles or _runs_kernels(decoder, config):
        raise ValueError(
            f"kv_dtype {config.kv_dtype}; accepted: model, and in float32 on a CPU without kernels bfloat16 or int8"
        )
    return wanted


def _runs_kernels(decoder: Decoder, config: EngineConfig) -> bool:
    return decoder.device.type == "cuda" if config.kernels is None else config.kernels


def _executor(model: SparseModel, cache: KvCache, config: EngineConfig) -> Executor:
    if not _runs_kernels(model.decoder, config):
        return OperatorExecutor(model, cache)
    # Where no kernel runs, Triton is not needed, and takes a second to import.
    from patchclamp_server.engine.executors.kernel_executor import KernelExecutor

    return KernelExecutor(model, cache, config)
