"""Analysis jobs: one at a time, in their order, ended with their call."""

import asyncio
import re
from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import aclosing
from pathlib import Path

import pytest

from patchclamp_server.analysis import exclusive
from patchclamp_server.analysis.exclusive import ExclusiveJobs
from patchclamp_server.errors import InvalidArgument


async def turns() -> None:
    """Lets every task get to where it waits."""
    for _ in range(9):
        await asyncio.sleep(0)


def named(name: str, log: list[str] | None = None) -> Callable[[], Awaitable[str]]:
    """A job that gives its name."""

    async def result() -> str:
        if log is not None:
            log.append(name)
        return name

    return result


async def numbers(n: int, log: list[str], closing: asyncio.Event | None = None) -> AsyncGenerator[int, None]:
    """A job of n events."""
    try:
        for i in range(n):
            await asyncio.sleep(0)
            yield i
    finally:
        if closing is not None:
            await closing.wait()
        log.append("numbers")


async def test_a_job_is_followed_to_its_end() -> None:
    assert [number async for number in ExclusiveJobs().follow(numbers(9, []))] == list(range(9))


async def test_what_a_followed_job_raises_is_raised_after_its_events() -> None:
    jobs, seen = ExclusiveJobs(), []

    async def fails() -> AsyncGenerator[int, None]:
        yield 1
        raise InvalidArgument("pairs", "too many")

    async def follow() -> None:
        async for event in jobs.follow(fails()):
            seen.append(event)

    with pytest.raises(InvalidArgument, match="too many"):
        await follow()
    assert seen == [1]
    assert await jobs.result(named("next")) == "next"


async def test_a_followed_job_is_over_before_the_next_one_begins_however_slowly_it_is_read() -> None:
    jobs, log = ExclusiveJobs(), []
    async with aclosing(jobs.follow(numbers(9, log))) as slowly:
        assert await anext(slowly) == 0
        await jobs.result(named("the next one", log))
        assert log == ["numbers", "the next one"]
        assert [number async for number in slowly] == list(range(1, 9))


async def test_leaving_a_followed_job_ends_it_before_the_next_one_begins() -> None:
    jobs, log, closing = ExclusiveJobs(), [], asyncio.Event()
    events = jobs.follow(numbers(10**9, log, closing))
    assert await anext(events) == 0
    leaving = asyncio.create_task(events.aclose())
    waiting = asyncio.create_task(jobs.result(named("the next one", log)))
    await turns()
    assert not leaving.done()
    closing.set()
    await leaving
    await waiting
    assert log == ["numbers", "the next one"]


async def test_jobs_run_one_at_a_time_in_the_order_they_came() -> None:
    jobs, log = ExclusiveJobs(), []

    async def named(name: int) -> AsyncGenerator[int, None]:
        for i in range(5):
            await asyncio.sleep(0)
            log.append(name)
            yield i

    async def follow(name: int) -> list[int]:
        return [event async for event in jobs.follow(named(name))]

    assert await asyncio.gather(*map(follow, range(8))) == [list(range(5))] * 8
    assert log == [name for name in range(8) for _ in range(5)]


async def test_a_followed_job_that_is_left_before_its_turn_never_runs() -> None:
    jobs, log, release = ExclusiveJobs(), [], asyncio.Event()
    first = asyncio.create_task(jobs.result(release.wait))
    second = asyncio.create_task(anext(jobs.follow(numbers(1, log))))
    await turns()
    second.cancel()
    await turns()
    release.set()
    assert await first
    with pytest.raises(asyncio.CancelledError):
        await second
    assert await jobs.result(named("third")) == "third"
    assert log == []


async def test_a_result_that_is_cancelled_while_it_waits_is_never_asked_for() -> None:
    jobs, release, ran = ExclusiveJobs(), asyncio.Event(), []
    first = asyncio.create_task(jobs.result(release.wait))
    second = asyncio.create_task(jobs.result(named("second", ran)))
    third = asyncio.create_task(jobs.result(named("third", ran)))
    await turns()
    second.cancel()
    await turns()
    release.set()
    assert await first
    assert await third == "third"
    assert second.cancelled()
    assert ran == ["third"]


def test_modules_with_passes_of_their_own_are_those_that_say_why() -> None:
    """A pass beside the engine's step is `documents.forward`, or a call of the decoder's own."""
    root = Path(exclusive.__file__).parent
    passes = re.compile(r"(?<!def )\bforward\(|\.run_blocks\(")
    found = {path.relative_to(root).as_posix() for path in root.rglob("*.py") if passes.search(path.read_text())}
    named = set(re.findall(r"^    (\S+\.py) ", exclusive.__doc__ or "", re.MULTILINE))
    assert found - {"documents.py"} == named
