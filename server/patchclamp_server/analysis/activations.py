"""Pooled activations of many prompts, collected through the engine as low-priority requests of one continuous batch."""

import asyncio
from collections.abc import AsyncGenerator, Callable, Sequence

from patchclamp_server.engine.engine import Engine
from patchclamp_server.engine.request import Capture, Captured, Event, Failed, Finished, Priority, Request, StopParams
from patchclamp_server.errors import ResourceExhausted
from patchclamp_server.interventions.pooling import Pooled

MAX_IN_FLIGHT = 64


async def collect(
    engine: Engine, prompts: Sequence[tuple[int, ...]], capture: Capture, *, max_in_flight: int = MAX_IN_FLIGHT
) -> AsyncGenerator[tuple[int, Pooled], None]:
    """Yields (index of the prompt, its pooled activations on the CPU) as prompts finish.

    At most `max_in_flight` requests are with the engine. When the iteration ends early, by an error, by `aclose` or by
    cancellation of the task, those still there are cancelled. Raises what the engine refuses a prompt with, or the
    error that a prompt failed with.
    """
    events: asyncio.Queue[tuple[int, Event]] = asyncio.Queue()
    waiting = list(range(len(prompts)))[::-1]
    in_flight: dict[int, int] = {}  # index of the prompt → id of its request
    try:
        while waiting or in_flight:
            while waiting and len(in_flight) < max_in_flight:
                request = Request(
                    tokens=prompts[waiting[-1]],
                    on_event=_forward(waiting[-1], events),
                    stop=StopParams(max_tokens=0),
                    priority=Priority.ANALYSIS,
                    capture=capture,
                )
                try:
                    in_flight[waiting[-1]] = engine.submit(request)
                except ResourceExhausted:
                    # Serving traffic fills the queue. One of ours that finishes makes room for the next.
                    if not in_flight:
                        raise
                    break
                waiting.pop()
            index, event = await events.get()
            match event:
                case Captured():
                    yield index, event.pooled.cpu()
                case Finished():
                    del in_flight[index]
                case Failed():
                    del in_flight[index]
                    raise event.error
    finally:
        for request_id in in_flight.values():
            engine.cancel(request_id)


def _forward(index: int, events: asyncio.Queue[tuple[int, Event]]) -> Callable[[Event], None]:
    """A callback for the engine's thread that puts the events of one prompt on the queue of the running loop."""
    loop = asyncio.get_running_loop()

    def on_event(event: Event) -> None:
        # A closed loop has nobody left to tell: what arrives then is the end of a request that was cancelled.
        if not loop.is_closed():
            loop.call_soon_threadsafe(events.put_nowait, (index, event))

    return on_event
