"""Work on texts has threads of its own, and ends with the call that asked for it."""

import asyncio
import threading
from contextvars import ContextVar

import pytest
from patience import PATIENCE_SECONDS

from patchclamp_server.errors import Cancelled, DeadlineExceeded
from patchclamp_server.text.text_threads import TextThreads, check_awaited


class Work:
    """Renders, so to say, until nobody waits any more; `go_on` lets it look."""

    def __init__(self) -> None:
        self.started, self.go_on, self.ended = threading.Event(), threading.Event(), threading.Event()
        self.error: BaseException | None = None

    def __call__(self) -> str:
        self.started.set()
        try:
            assert self.go_on.wait(PATIENCE_SECONDS)
            check_awaited()
            return "done"
        except BaseException as error:
            self.error = error
            raise
        finally:
            self.ended.set()


async def waited(event: threading.Event) -> None:
    assert await asyncio.to_thread(event.wait, PATIENCE_SECONDS)


async def test_the_end_of_a_call_ends_its_work() -> None:
    threads, work = TextThreads("test"), Work()
    call = asyncio.create_task(threads.run(work))
    await waited(work.started)
    call.cancel()
    with pytest.raises(asyncio.CancelledError):
        await call
    work.go_on.set()
    await waited(work.ended)
    assert isinstance(work.error, Cancelled)
    threads.close()


async def test_work_whose_call_has_ended_before_it_begins_does_not_begin() -> None:
    threads, first, second = TextThreads("test", threads=1), Work(), Work()
    running, waiting = asyncio.create_task(threads.run(first)), asyncio.create_task(threads.run(second))
    await waited(first.started)
    waiting.cancel()
    with pytest.raises(asyncio.CancelledError):
        await waiting
    first.go_on.set()
    assert await running == "done"
    assert await threads.run(lambda: "next") == "next"
    assert not second.started.is_set()
    threads.close()


async def test_work_that_takes_too_long_is_ended() -> None:
    threads, work = TextThreads("test", most_seconds=0.0), Work()
    with pytest.raises(DeadlineExceeded):
        await threads.run(work)
    assert not work.started.is_set()
    threads.close()


async def test_the_context_of_the_call_is_taken_along() -> None:
    variable: ContextVar[int] = ContextVar("variable", default=0)
    variable.set(7)
    threads = TextThreads("test")
    assert await threads.run(variable.get) == 7
    threads.close()


async def test_texts_take_no_threads_from_other_work() -> None:
    threads, work = TextThreads("test", threads=1), Work()
    call = asyncio.create_task(threads.run(work))
    await waited(work.started)
    assert await asyncio.to_thread(lambda: "at once") == "at once"
    work.go_on.set()
    assert await call == "done"
    threads.close()


def test_without_threads_of_their_own_texts_are_always_awaited() -> None:
    check_awaited()
