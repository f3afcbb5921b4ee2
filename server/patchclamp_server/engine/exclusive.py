"""The exclusive door: work of the engine itself that no request can say, such as passes that begin at a layer, and
what is read from weights alone.

A work is a generator that the engine's thread runs between its steps. It yields a `Slice` before each part of what it
computes, and is sent how many rows that part may have; whatever else it yields is told to whoever waits for it. A row
is one token through all layers: a part of a pass counts rows · layers / all layers.

    rows of a slice = seconds / r          r seconds of a row in the work's own slices

with the seconds of a turn of analysis beside more urgent requests, and those of analysis alone without them
(analysis_share.py). A slice that took longer, since its smallest part has more rows, makes the next turn of analysis
come later. Of several works that which has had the least time for the weight of its caller is next.

Works run as analysis does: in the context of the call that brought them, so that its tenant pays for their tokens.
They are refused where an analysis request would be. Their KV is a pool of a layer, not a share of the engine's cache.
"""

import logging
import threading
import time
from collections.abc import Callable, Generator
from contextvars import Context, copy_context
from dataclasses import dataclass, field
from typing import Any, TypeAlias, TypeVar

import torch

from patchclamp_server.callers import CALLER
from patchclamp_server.engine.faults import fault_of, is_device_lost, is_out_of_memory
from patchclamp_server.engine.pace import smoothed
from patchclamp_server.errors import Cancelled, Unavailable

log = logging.getLogger(__name__)

# The first slice of a work has so many rows, and shows how long its rows take.
FIRST_ROWS = 8

E = TypeVar("E")
T = TypeVar("T")


@dataclass(frozen=True)
class Slice:
    """What a work computes next: at most so many `rows`, but at least its smallest part, whatever it is sent. Its
    caller pays for the `tokens` that it begins with."""

    rows: int
    tokens: int = 0


# A part of a work returns something.
Sliced: TypeAlias = Generator[Slice, int, T]
# Such a part also tells something on its way.
Telling: TypeAlias = Generator[Slice | E, int, T]
Work: TypeAlias = Generator[Slice | E, int, None]


@dataclass(eq=False)
class Entry:
    """A work at the door. `on_event` and `on_end` are called on the engine's thread and must not block."""

    work: Work[Any]
    on_event: Callable[[Any], None]
    on_end: Callable[[BaseException | None], None]
    weight: float
    # Says that whoever waits has enough for now: no slice runs until it has taken some.
    is_held: Callable[[], bool] = lambda: False
    context: Context = field(default_factory=copy_context)
    # It is None before the first slice.
    wanted: Slice | None = None
    row_seconds: float | None = None
    # The seconds that it has had, divided by its weight.
    service: float = 0.0


class ExclusiveDoor:
    def __init__(self, device: torch.device, charge: Callable[[int], None]) -> None:
        """`charge` is called in the context of a work with the tokens that it begins. It raises QuotaExceeded."""
        self._device, self._charge = device, charge
        self._threads = torch.get_num_threads()
        self._lock = threading.Lock()
        self._idle = threading.Condition(self._lock)
        # Entries change under the lock; all but the first step of an entry happens on the engine's thread.
        self._entries: list[Entry] = []
        self._closed = False

    # Any thread may call what follows.

    def enter(
        self,
        work: Work[E],
        on_event: Callable[[E], None],
        on_end: Callable[[BaseException | None], None],
        is_held: Callable[[], bool] = lambda: False,
    ) -> Entry:
        """Queues a work. `on_end` is told why it ended, with None when it has finished. No slice of it runs while
        `is_held`, which must not block. Raises Unavailable after `close`."""
        entry = Entry(work, on_event, on_end, CALLER.get().weight, is_held)
        with self._lock:
            if self._closed:
                raise Unavailable("", "the engine has stopped")
            # A new work does not make up for what others had before it came.
            entry.service = min((e.service for e in self._entries), default=0.0)
            self._entries.append(entry)
        return entry

    def close(self) -> None:
        """Lets nothing in any more."""
        with self._lock:
            self._closed = True

    def wait_until_idle(self, timeout_seconds: float) -> bool:
        """Returns True when no work is left."""
        with self._lock:
            return self._idle.wait_for(lambda: not self._entries, timeout=timeout_seconds)

    # Only the engine's thread calls what follows.

    @property
    def busy(self) -> bool:
        """Whether there is a work that a slice could be run of."""
        return any(not entry.is_held() for entry in self._entries)

    def run(self, seconds: float) -> float:
        """Runs a slice of about so many seconds, the smallest there is for 0. Returns the seconds that it took."""
        # A work that others hold back may be the only one by now: what it tells is for them to keep.
        ready = [entry for entry in self._entries if not entry.is_held()] or self._entries
        entry = min(ready, key=lambda e: e.service)
        torch.set_num_threads(self._threads)
        started = time.monotonic()
        rows = _rows(entry, seconds)
        self._advance(entry, rows)
        took = time.monotonic() - started
        entry.service += took / entry.weight
        if rows:
            entry.row_seconds = smoothed(entry.row_seconds, took / rows)
        return took

    def leave(self, entry: Entry, error: BaseException | None = None) -> None:
        """Ends a work where it is; nothing happens when it has ended."""
        if entry not in self._entries:
            return
        try:
            entry.context.run(entry.work.close)
        except Exception as failure:
            log.exception("a work failed where it was ended")
            error = failure
        self._end(entry, error or Cancelled("", "the work was cancelled"))

    def end_all(self, error: BaseException) -> None:
        self.close()
        for entry in list(self._entries):
            self.leave(entry, error)

    def _advance(self, entry: Entry, rows: int) -> None:
        """Runs the work up to the next slice that it asks for, or to its end."""
        work, context = entry.work, entry.context
        try:
            with torch.inference_mode():
                if entry.wanted is not None and entry.wanted.tokens:
                    context.run(self._charge, entry.wanted.tokens)
                told = context.run(next, work) if entry.wanted is None else context.run(work.send, rows)
                while not isinstance(told, Slice):
                    entry.on_event(told)
                    told = context.run(next, work)
            if self._device.type == "cuda":
                # The slice takes as long as what it has launched.
                torch.cuda.synchronize(self._device)
            entry.wanted = told
        except StopIteration:
            self._end(entry, None)
        except Exception as error:
            work.close()
            if is_device_lost(error):
                raise
            self._end(entry, fault_of(error) if is_out_of_memory(error) else error)

    def _end(self, entry: Entry, error: BaseException | None) -> None:
        with self._lock:
            self._entries.remove(entry)
            self._idle.notify_all()
        entry.on_end(error)


def _rows(entry: Entry, seconds: float) -> int:
    """Returns how many rows the next slice of a work may have, or 0 before its first."""
    if entry.wanted is None:
        return 0
    most = max(1, entry.wanted.rows)
    if entry.row_seconds is None:
        return min(most, FIRST_ROWS)
    return most if seconds >= most * entry.row_seconds else max(1, int(seconds / entry.row_seconds))


def events_of(work: Telling[E, T]) -> Generator[E, None, T]:
    """Yields what a work tells, computed in this thread without an engine, with slices as large as it likes."""
    granted: int | None = None
    while True:
        try:
            with torch.inference_mode():
                told = next(work) if granted is None else work.send(granted)
        except StopIteration as end:
            result: T = end.value
            return result
        granted = None
        if isinstance(told, Slice):
            granted = max(1, told.rows)
        else:
            yield told


def at_once(work: Telling[Any, T]) -> T:
    """Returns what a part of a work returns, computed as by `events_of`."""
    events = events_of(work)
    while True:
        try:
            next(events)
        except StopIteration as end:
            result: T = end.value
            return result
