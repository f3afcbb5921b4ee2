"""Calls stream what the engine's thread tells of running watches; only a bounded amount ever waits.

Serving never waits for a reader. A reader of activations that is too slow loses the newest, and is told how many; of
progress only the latest counts.
"""

import threading
from collections import Counter
from collections.abc import AsyncIterator, Callable
from dataclasses import fields, replace
from typing import TypeAlias

from patchclamp_server.errors import RequestError
from patchclamp_server.monitoring.activations import Activations
from patchclamp_server.monitoring.reference import Reference
from patchclamp_server.monitoring.running import RunningWatch
from patchclamp_server.rpc.streams.stream import EventBridge, EventStream

# So many activations may wait for one reader: about 2 MB as messages.
MAX_WAITING = 16_384


class DroppedEvents:
    """Counts activations that readers did not get, by running watch; it may be used from any thread."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        # A later watch of the same name was started at another time.
        self._counts: Counter[tuple[str, float]] = Counter()

    def add(self, watch: RunningWatch, n: int) -> None:
        with self._lock:
            self._counts[watch.name, watch.started] += n

    def of(self, watch: RunningWatch) -> int:
        with self._lock:
            return self._counts[watch.name, watch.started]

    def forget(self, watch: RunningWatch) -> None:
        with self._lock:
            self._counts.pop((watch.name, watch.started), None)


class ActivationStream:
    """Holds one call's activations. `put` and `end` work on any thread, `batches` in one task of the bridge's loop."""

    def __init__(self, bridge: EventBridge, on_dropped: Callable[[int], None]) -> None:
        self._events: EventStream[Activations | RequestError | None] = EventStream(bridge)
        self._on_dropped = on_dropped
        self._lock = threading.Lock()
        self._waiting = self._dropped = 0

    def put(self, activations: Activations | None) -> None:
        """Adds activations; None is the end. It never blocks, and counts what finds no room."""
        if activations is None:
            self._events.put(None)
            return
        n, lost = len(activations.items), activations.dropped
        with self._lock:
            fits = self._waiting + n <= MAX_WAITING
            self._waiting += n if fits else 0
            lost += 0 if fits else n
            self._dropped += lost
        if lost:
            self._on_dropped(lost)
        if fits:
            self._events.put(activations)

    def end(self, error: RequestError) -> None:
        """Makes `batches` raise this error once it has given what came before."""
        self._events.put(error)

    async def batches(self) -> AsyncIterator[tuple[Activations, int]]:
        """Yields what came, and how many were dropped since the last, until there is no more to come."""
        while True:
            for event in await self._events.batch():
                if event is None:
                    return
                if isinstance(event, RequestError):
                    raise event
                with self._lock:
                    self._waiting -= len(event.items)
                    dropped, self._dropped = self._dropped, 0
                yield event, dropped


def first(activations: Activations, n: int) -> Activations:
    """Returns the n oldest of a batch."""
    columns = [field.name for field in fields(Activations) if field.name != "dropped"]
    return replace(activations, **{name: getattr(activations, name)[:n] for name in columns})


Progress: TypeAlias = tuple[int, int]


class RecordingStream:
    """Follows a reference that is recorded for one call. `on_progress`, `on_done` and `end` work on any thread."""

    def __init__(self, bridge: EventBridge) -> None:
        self._events: EventStream[Reference | RequestError | Progress | None] = EventStream(bridge)
        self._lock = threading.Lock()
        self._latest: Progress | None = None

    def on_progress(self, tokens: int, total: int) -> None:
        with self._lock:
            is_news = self._latest is None
            self._latest = (tokens, total)
        if is_news:
            self._events.put((tokens, total))

    def on_done(self, reference: Reference | None) -> None:
        """Ends the recording; None means that there will be no reference."""
        self._events.put(reference)

    def end(self, error: RequestError) -> None:
        self._events.put(error)

    async def events(self) -> AsyncIterator[Reference | Progress | None]:
        """Yields progress, and last the reference, or None."""
        while True:
            for event in await self._events.batch():
                if isinstance(event, RequestError):
                    raise event
                if not isinstance(event, tuple):
                    yield event
                    return
                with self._lock:
                    latest, self._latest = self._latest, None
                assert latest is not None
                yield latest
