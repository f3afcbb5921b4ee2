"""Many requests as one continuous batch of low-priority sequences, which serving traffic goes before."""

import asyncio
from collections.abc import AsyncGenerator, Callable, Iterable
from typing import TypeAlias

from patchclamp_server.engine.engine import Engine
from patchclamp_server.engine.request import Event, Failed, Finished, Request
from patchclamp_server.errors import ResourceExhausted

MAX_IN_FLIGHT = 16
OnEvent: TypeAlias = Callable[[Event], None]


async def completed(
    engine: Engine, requests: Iterable[Callable[[OnEvent], Request]], *, max_in_flight: int = MAX_IN_FLIGHT
) -> AsyncGenerator[list[Event], None]:
    """Yields all events of each request, in the order of the requests; at most `max_in_flight` are with the engine.

    A request is made when its turn comes. When the iteration ends early, by an error, by `aclose` or by cancellation of
    the task, those still with the engine are cancelled. Raises what the engine refuses a request with, or the error
    that a request failed with.
    """
    queue: asyncio.Queue[tuple[int, Event]] = asyncio.Queue()
    waiting = enumerate(requests)
    upcoming = next(waiting, None)
    in_flight: dict[int, int] = {}  # index of the request → its id
    events: dict[int, list[Event]] = {}
    finished: set[int] = set()
    following = 0
    try:
        while upcoming is not None or in_flight:
            while upcoming is not None and len(in_flight) < max_in_flight:
                index, make = upcoming
                try:
                    in_flight[index] = engine.submit(make(_forward(index, queue)))
                except ResourceExhausted:
                    # Serving traffic fills the queue. One of ours that finishes makes room for the next.
                    if not in_flight:
                        raise
                    break
                events[index] = []
                upcoming = next(waiting, None)
            index, event = await queue.get()
            events[index].append(event)
            if isinstance(event, Failed):
                del in_flight[index]
                raise event.error
            if isinstance(event, Finished):
                del in_flight[index]
                finished.add(index)
            while following in finished:
                finished.remove(following)
                yield events.pop(following)
                following += 1
    finally:
        for request_id in in_flight.values():
            engine.cancel(request_id)


def _forward(index: int, queue: asyncio.Queue[tuple[int, Event]]) -> OnEvent:
    """A callback for the engine's thread that puts the events of one request on the queue of the running loop."""
    loop = asyncio.get_running_loop()

    def on_event(event: Event) -> None:
        # A closed loop has nobody left to tell: what arrives then is the end of a request that was cancelled.
        if not loop.is_closed():
            loop.call_soon_threadsafe(queue.put_nowait, (index, event))

    return on_event
