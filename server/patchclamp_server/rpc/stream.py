"""From the engine's thread to the event loop: events wait in a buffer until the client's stream can take them.

One wake-up of the loop serves every stream that got events since the last one, so a step that emits for 256 streams
costs one system call. A stream whose client is slow just collects: its next batch holds several tokens, in order.
"""

import asyncio
from collections import deque
from typing import Any, Generic, TypeVar

E = TypeVar("E")

# Between a token and its text lies some work. Sent as they come, they would be two messages and wake the loop in the
# middle of a step; the engine does not wait for this, so it delays every token alike and slows none down.
COALESCE_SECONDS = 0.001


class EventBridge:
    """Wakes streams on `loop` from any thread."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop
        self._ready: deque[EventStream[Any]] = deque()
        self._scheduled = False

    def wake(self, stream: "EventStream[Any]") -> None:
        """From any thread. Appending comes before the test and clearing before the emptying: no event is missed."""
        self._ready.append(stream)
        if not self._scheduled:
            self._scheduled = True
            self._loop.call_soon_threadsafe(self._run)

    def _run(self) -> None:
        self._loop.call_later(COALESCE_SECONDS, self._release)

    def _release(self) -> None:
        self._scheduled = False
        while self._ready:
            self._ready.popleft().set_ready()


class EventStream(Generic[E]):
    """Events of one call. `put` on any thread; `batch` in one task of the bridge's loop."""

    def __init__(self, bridge: EventBridge) -> None:
        self._bridge = bridge
        self._events: deque[E] = deque()
        self._ready = asyncio.Event()

    def put(self, event: E) -> None:
        """Never blocks."""
        self._events.append(event)
        self._bridge.wake(self)

    def set_ready(self) -> None:
        self._ready.set()

    async def batch(self) -> list[E]:
        """Everything that has come since the last batch, in order; at least one event."""
        while not self._events:
            self._ready.clear()
            if not self._events:
                await self._ready.wait()
        events: list[E] = []
        while self._events:
            events.append(self._events.popleft())
        return events
