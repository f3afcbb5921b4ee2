"""Holds requests between their submission and their last event, and decides how they get in and how they end."""

import logging
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

from patchclamp_server.engine.admission import Admission, Demand, Refusal
from patchclamp_server.engine.config import EngineObserver, Unobserved
from patchclamp_server.engine.faults import fault_of, is_device_lost
from patchclamp_server.engine.intake import Intake
from patchclamp_server.engine.request import Failed, FinishReason, Request
from patchclamp_server.engine.scheduler import Scheduler
from patchclamp_server.engine.sequence import Sequence
from patchclamp_server.errors import (
    Aborted,
    Cancelled,
    DeadlineExceeded,
    RequestError,
    ResourceExhausted,
    Unavailable,
)
from patchclamp_server.interventions.program import Receipt
from patchclamp_server.interventions.state import EMPTY_RECEIPT
from patchclamp_server.interventions.tables import Tables

log = logging.getLogger(__name__)

# These errors end a request for what it asked, or for who asked: its steps were as good as any.
ENDED_BY_ITS_CLIENT = (Aborted, Cancelled, DeadlineExceeded)


class LiveRequests:
    def __init__(self, intake: Intake, scheduler: Scheduler, tables: Tables, admission: Admission) -> None:
        self.observer: EngineObserver = Unobserved()
        # These are the sequences of all requests that the engine's thread has taken in; only that thread reads them.
        self.sequences: dict[int, Sequence] = {}
        # Only requests with a deadline are here.
        self.deadlines: dict[int, float] = {}
        self._intake, self._scheduler, self._tables, self._admission = intake, scheduler, tables, admission
        self._lock = threading.Lock()
        self._idle = threading.Condition(self._lock)
        # They change under the lock, as admission does.
        self.requests: dict[int, Request] = {}
        self._next_id = 1
        self._closed = False

    # Any thread may call what follows.

    def admit(self, request: Request, arrival: float) -> int:
        """Admits a request and returns its id. Raises ResourceExhausted when the queue is full or the deadline would
        not be met, and Unavailable when nothing is let in any more."""
        demand = self._intake.demand(request)
        with self._lock:
            if self._closed:
                raise Unavailable("", "the engine has stopped")
            seconds_left = None if request.deadline is None else request.deadline - arrival
            refusal = self._admission.check(demand, seconds_left)
            if refusal is None:
                request_id = self._next_id
                self._next_id += 1
                self.requests[request_id] = request
                self._admission.enter(request_id, demand)
        if refusal is not None:
            raise self.refused(refusal)
        return request_id

    def check_room(self, demand: Demand) -> None:
        """Raises ResourceExhausted when a request with this demand would be refused."""
        with self._lock:
            refusal = self._admission.check(demand)
        if refusal is not None:
            raise self.refused(refusal)

    def refused(self, refusal: Refusal) -> ResourceExhausted:
        self.observer.on_refused(refusal.reason)
        error = ResourceExhausted("", refusal.message)
        error.retry_after_seconds = refusal.retry_after_seconds
        return error

    def get(self, request_id: int) -> Request | None:
        with self._lock:
            return self.requests.get(request_id)

    def close(self) -> None:
        """Lets nothing in any more."""
        with self._lock:
            self._closed = True

    def wait_until_idle(self, timeout_seconds: float) -> bool:
        """Returns True when no request is left."""
        with self._lock:
            return self._idle.wait_for(lambda: not self.requests, timeout=timeout_seconds)

    # Only the engine's thread calls what follows.

    def take_in(self, request_id: int, request: Request, arrival: float) -> None:
        """Makes a sequence of a request, which the scheduler may start."""
        try:
            sequence = self._intake.sequence(request_id, request, arrival)
        except Exception as error:
            log.exception("request %d could not be taken in", request_id)
            if is_device_lost(error):
                raise
            self._end_failed(request_id, request, fault_of(error))
            return
        self.sequences[request_id] = sequence
        if request.deadline is not None:
            self.deadlines[request_id] = request.deadline
        self._scheduler.add(sequence)
        if sequence.follower is not None:
            self._scheduler.add(sequence.follower)

    def started(self, sequences: list[Sequence]) -> None:
        """Is called when a step begins in which these run for the first time."""
        for sequence in sequences:
            self.observer.on_queue_wait((sequence.admitted_at or sequence.arrival) - sequence.arrival)
        with self._lock:
            self._admission.on_step([s.id for s in sequences], time.monotonic(), contended=self._scheduler.contended)

    @contextmanager
    def concerning(self, sequence: Sequence) -> Iterator[None]:
        """Confines what concerns one request alone: an exception inside fails that request and no other."""
        try:
            yield
        except Exception as error:
            self.broke(sequence, error)

    def broke(self, sequence: Sequence, error: Exception) -> None:
        """Fails the request that an exception concerns alone; raises it again where the device is lost."""
        log.error("request %d failed", sequence.id, exc_info=error)
        if is_device_lost(error):
            raise error
        self.fail(sequence, fault_of(error))

    def finish_id(self, request_id: int) -> None:
        """Ends a request as if it had reached its last token."""
        sequence = self.sequences.get(request_id)
        if sequence is not None and sequence.ended is None:
            self.finish(sequence, FinishReason.CLIENT)

    def finish(self, sequence: Sequence, reason: FinishReason) -> None:
        """Ends a sequence, once its follower has caught up."""
        sequence.ended = reason
        self._scheduler.remove(sequence)
        if sequence.follower is None or sequence.follower.remaining <= 0:
            self.complete(sequence, reason)

    def complete(self, sequence: Sequence, reason: FinishReason) -> None:
        with self.concerning(sequence):
            receipt = self._receipt(sequence)
            self._release(sequence)
            self._measure(sequence)
            sequence.emit_finished(reason, receipt)
            self._observe_edits(sequence, receipt)
        if sequence.id in self.requests:
            self._leave(sequence, reason.value)

    def fail_id(self, request_id: int, error: RequestError) -> None:
        """Fails a request; nothing happens when it has ended."""
        sequence = self.sequences.get(request_id)
        if sequence is not None:
            self.fail(sequence, error)

    def fail(self, sequence: Sequence, error: RequestError) -> None:
        # What was counted in a step that failed is no evidence, and a lost device can no longer be asked.
        receipt = self._receipt(sequence) if isinstance(error, ENDED_BY_ITS_CLIENT) else None
        self._release(sequence)
        _tell(sequence.request, sequence.failed(error))
        self._observe_edits(sequence, receipt)
        self._leave(sequence, _outcome(error))

    def abort(self, request_id: int, error: Aborted) -> None:
        """Ends a request of which an abort condition held; nothing happens when it has ended."""
        if request_id in self.sequences:
            self.observer.on_aborted()
            self.fail_id(request_id, error)

    def fail_all(self, error: RequestError) -> None:
        """Fails all requests, including those that have not been taken in."""
        for request_id, request in list(self.requests.items()):
            self._end_failed(request_id, request, error)

    def _end_failed(self, request_id: int, request: Request, error: RequestError) -> None:
        """Fails a request, whether it has a sequence or not."""
        if request_id in self.sequences:
            self.fail(self.sequences[request_id], error)
            return
        _tell(request, Failed(error))
        self._forget(request_id, _outcome(error))

    def _receipt(self, sequence: Sequence) -> Receipt:
        """Returns the receipt of a sequence, which must still hold its rows of the tables."""
        state = sequence.state
        receipt = EMPTY_RECEIPT if state is None else state.receipt(self._tables.read(state.loaded))
        return replace(receipt, warnings=(*sequence.request.warnings, *receipt.warnings))

    def _observe_edits(self, sequence: Sequence, receipt: Receipt | None) -> None:
        """Reports edits that clients were served; edits of analysis jobs are not reported."""
        if not sequence.is_served or sequence.admitted_at is None:
            return
        if sequence.state is not None and sequence.state.bound.edits:
            self.observer.on_edited(sequence.state.bound.program.edits, receipt)
        for warning in receipt.warnings if receipt is not None else ():
            self.observer.on_warning(warning.code)

    def _measure(self, sequence: Sequence) -> None:
        """Gives admission the times of a request that has run to its end."""
        now = time.monotonic()
        generated_from = sequence.first_token_at or now
        request = sequence.request
        with self._lock:
            self._admission.on_finished(
                self._intake.demand(request),
                generated=len(sequence.output_ids),
                prefill_seconds=generated_from - (sequence.admitted_at or sequence.arrival),
                decode_seconds=now - generated_from,
                paced=request.credits is not None or sequence.was_paused or bool(sequence.preempted_at),
            )

    def _release(self, sequence: Sequence) -> None:
        """Gives back all that a sequence holds; nothing happens when that has been done."""
        if self.sequences.pop(sequence.id, None) is None:
            return
        self.deadlines.pop(sequence.id, None)
        self._scheduler.remove(sequence)
        if sequence.follower is not None:
            self._scheduler.remove(sequence.follower)
        if sequence.state is not None:
            self._tables.release(sequence.state.loaded)

    def _leave(self, sequence: Sequence, outcome: str) -> None:
        """Is called after the last event of a sequence."""
        compares = sequence.request.scores is not None
        if sequence.sparse is not None and not sequence.sparse.asked.listens and not compares:
            self.observer.on_sparse_finished(sequence.sparse.report(sequence.computed))
        self._forget(sequence.id, outcome)

    def _forget(self, request_id: int, outcome: str) -> None:
        try:
            self.observer.on_finished(outcome)
        finally:
            with self._lock:
                del self.requests[request_id]
                self._admission.leave(request_id)
                self._idle.notify_all()


def _tell(request: Request, failed: Failed) -> None:
    """Sends the last event of a request. Nobody is left to be told when that fails."""
    try:
        request.on_event(failed)
    except Exception:
        log.exception("a request could not be told that it failed")


def _outcome(error: RequestError) -> str:
    """Returns the name of an error in snake_case, as finish reasons are."""
    name = type(error).__name__
    return "".join("_" + c.lower() if c.isupper() else c for c in name).lstrip("_")
