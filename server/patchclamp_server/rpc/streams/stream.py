"""Events go from the engine's thread to the event loop, and wait in a buffer until the client's stream takes them.

One wake-up of the loop serves every stream that got events since the last one, so a step that emits for 256 streams
costs one system call. The events of a slow client pile up: its next batch holds several tokens, in order. When many
have piled up, its sequence is held back until the client has read (Request.held), so a client that stops reading costs
a bounded amount of memory.
"""

import asyncio
from collections import deque
from collections.abc import Callable
from typing import Any, Generic, TypeVar

from patchclamp_server.engine.request import PromptToken, Readouts, Token

E = TypeVar("E")

# So many numbers may wait in a stream, some 40 bytes each; what a single step brings comes on top.
MAX_WAITING_VALUES = 32768
# An event counts so much besides the numbers that it carries.
EVENT_VALUES = 8

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
        """May be called on any thread. It appends before it tests, _release clears before it empties: none is lost."""
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
    """Holds the events of one call. `put` may be called on any thread, `batch` in one task of the bridge's loop.

    `on_read` is called in the loop after a batch that was large enough for the stream to have been full.
    """

    def __init__(self, bridge: EventBridge, on_read: Callable[[], None] = lambda: None) -> None:
        self._bridge = bridge
        self._on_read = on_read
        self._events: deque[E] = deque()
        self._ready = asyncio.Event()
        # There are two counts, each written by one thread.
        self._put_values = self._read_values = 0

    def put(self, event: E) -> None:
        """Adds an event; it never blocks."""
        self._put_values += values_of(event)
        self._events.append(event)
        self._bridge.wake(self)

    def is_full(self) -> bool:
        """Returns, on any thread, whether whoever puts should wait until more has been read."""
        return self._put_values - self._read_values >= MAX_WAITING_VALUES

    def set_ready(self) -> None:
        self._ready.set()

    async def batch(self) -> list[E]:
        """Returns everything that has come since the last batch, in order; at least one event."""
        while not self._events:
            self._ready.clear()
            if not self._events:
                await self._ready.wait()
        events: list[E] = []
        values = 0
        while self._events:
            events.append(self._events.popleft())
            values += values_of(events[-1])
        self._read_values += values
        # While it was full, this batch and the next, which may have come meanwhile, held at least the limit together.
        if 2 * values >= MAX_WAITING_VALUES:
            self._on_read()
        return events


def values_of(event: Any) -> int:
    """Returns how much an event counts. An event may be a pair: the side that it belongs to, and the event itself."""
    if isinstance(event, tuple) and len(event) == 2:
        event = event[1]
    match event:
        case Readouts():
            return EVENT_VALUES + sum(EVENT_VALUES + len(value.values) for value in event.values)
        case Token() | PromptToken():
            return EVENT_VALUES + len(event.top_logprobs)
        case _:
            return EVENT_VALUES
