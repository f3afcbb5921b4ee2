"""What analysis jobs have the engine do: many requests as one continuous batch of low-priority sequences, which serving
traffic goes before, and works at its exclusive door."""

import asyncio
from collections.abc import AsyncGenerator, AsyncIterable, Callable, Iterable
from contextlib import aclosing
from dataclasses import dataclass
from typing import TypeAlias, TypeVar

from patchclamp_server.engine.engine import Engine
from patchclamp_server.engine.exclusive import Sliced, Work
from patchclamp_server.engine.reducers.divergence import ScoreReducer
from patchclamp_server.engine.request import Event, Failed, Finished, Priority, Request
from patchclamp_server.errors import QuotaExceeded, ResourceExhausted
from patchclamp_server.interventions.bound import BoundProgram

MAX_IN_FLIGHT = 16
# Events of a work that nobody has taken yet: a slice ends before they are more than these and its own.
MAX_UNTAKEN = 64
OnEvent: TypeAlias = Callable[[Event], None]
Make: TypeAlias = Callable[[OnEvent], Request]
T = TypeVar("T")


def _weightless(make: Make) -> int:
    return 0


async def completed(
    engine: Engine,
    requests: Iterable[Make] | AsyncIterable[Make],
    *,
    max_in_flight: int = MAX_IN_FLIGHT,
    patient: bool = False,
    weight: Callable[[Make], int] = _weightless,
    most_weight: int = 0,
) -> AsyncGenerator[list[Event], None]:
    """Yields all events of each request, in the order of the requests; at most `max_in_flight` are with the engine.

    Of those that are with it or wait to be taken, what `weight` says of them is `most_weight` together at most, or they
    are one.

    A request is made when its turn comes. `patient`: where serving traffic leaves no room for any of them, waits for
    room, and does not raise. When the iteration ends early, by an error, by `aclose` or by cancellation of
    the task, those still with the engine are cancelled. Raises what the engine refuses a request with, or the error
    that a request failed with.
    """
    queue: asyncio.Queue[tuple[int, Event]] = asyncio.Queue()
    in_flight: dict[int, int] = {}  # index of the request → its id
    events: dict[int, list[Event]] = {}
    finished: set[int] = set()
    held: dict[int, int] = {}  # index of a request that nobody has done with yet → its weight
    following = 0
    async with aclosing(_each(requests)) as waiting:
        try:
            upcoming, index = await anext(waiting, None), 0
            while upcoming is not None or in_flight:
                while upcoming is not None and len(in_flight) < max_in_flight:
                    own = weight(upcoming)
                    if held and sum(held.values()) + own > most_weight:
                        break
                    try:
                        in_flight[index] = engine.submit(upcoming(_forward(index, queue)))
                    except ResourceExhausted as error:
                        # Serving traffic fills the queue. One of ours that finishes makes room for the next.
                        if in_flight:
                            break
                        if not patient or isinstance(error, QuotaExceeded):
                            raise
                        await asyncio.sleep(error.retry_after_seconds)
                        continue
                    events[index] = []
                    if own:
                        held[index] = own
                    upcoming, index = await anext(waiting, None), index + 1
                number, event = await queue.get()
                events[number].append(event)
                if isinstance(event, Failed):
                    del in_flight[number]
                    raise event.error
                if isinstance(event, Finished):
                    del in_flight[number]
                    finished.add(number)
                while following in finished:
                    finished.remove(following)
                    yield events.pop(following)
                    held.pop(following, None)
                    following += 1
        finally:
            for request_id in in_flight.values():
                engine.cancel(request_id)


async def _each(requests: Iterable[Make] | AsyncIterable[Make]) -> AsyncGenerator[Make, None]:
    if isinstance(requests, AsyncIterable):
        async for make in requests:
            yield make
    else:
        for make in requests:
            yield make


def score_request(
    prompt: tuple[int, ...],
    continuation: tuple[int, ...],
    program: BoundProgram | None,
    on_event: OnEvent,
    *,
    scores: ScoreReducer | None = None,
) -> Request:
    """Returns a request that scores the tokens of a continuation. `scores` takes what they are scored with."""
    tokens, start = prompt + continuation, len(prompt)
    return Request(tokens, on_event, program, priority=Priority.ANALYSIS, score_from=start, scores=scores)


def _forward(index: int, queue: asyncio.Queue[tuple[int, Event]]) -> OnEvent:
    """A callback for the engine's thread that puts the events of one request on the queue of the running loop."""
    loop = asyncio.get_running_loop()

    def on_event(event: Event) -> None:
        # A closed loop has nobody left to tell: what arrives then is the end of a request that was cancelled.
        if not loop.is_closed():
            loop.call_soon_threadsafe(queue.put_nowait, (index, event))

    return on_event


@dataclass(frozen=True)
class _End:
    error: BaseException | None


async def exclusively(engine: Engine, work: Work[T]) -> AsyncGenerator[T, None]:
    """Yields what a work tells, while the engine's thread runs it slice by slice; raises what it raises.

    When the iteration ends early, by `aclose` or by cancellation of the task, the work ends after the slice that runs,
    and no part of it runs any more once this has returned. While MAX_UNTAKEN events wait to be taken, no slice runs.
    """
    loop = asyncio.get_running_loop()
    told: asyncio.Queue[T | _End] = asyncio.Queue()
    ended: asyncio.Future[None] = loop.create_future()
    # Events: the engine's thread counts those that were told, this one those that were taken.
    n_told = n_taken = 0

    def tell(item: T | _End) -> None:
        nonlocal n_told
        n_told += 1
        if not loop.is_closed():
            loop.call_soon_threadsafe(put, item)

    def put(item: T | _End) -> None:
        told.put_nowait(item)
        if isinstance(item, _End) and not ended.done():
            ended.set_result(None)

    entry = engine.enter(work, tell, lambda error: tell(_End(error)), lambda: n_told - n_taken >= MAX_UNTAKEN)
    try:
        while not isinstance(item := await told.get(), _End):
            yield item
            n_taken += 1
            if n_told - n_taken == MAX_UNTAKEN - 1:
                engine.wake()
        if item.error is not None:
            raise item.error
    finally:
        if not ended.done():
            engine.leave(entry)
            await asyncio.wait((ended,))


async def result_of(engine: Engine, part: Sliced[T]) -> T:
    """What a work returns; as `exclusively` in all else."""

    def work() -> Work[T]:
        yield (yield from part)

    async with aclosing(exclusively(engine, work())) as events:
        return await anext(events)
