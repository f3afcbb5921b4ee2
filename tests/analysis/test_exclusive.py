"""Analysis jobs: one at a time, in their order, ended with their call."""

import asyncio
import threading
from collections.abc import AsyncGenerator
from contextlib import aclosing

import pytest

from patchclamp_server.analysis.exclusive import ExclusiveJobs, Job
from patchclamp_server.errors import Cancelled, InvalidArgument


def counting(n: int):
    def work(job: Job[int]) -> None:
        for i in range(n):
            job.emit(i)

    return work


async def test_events_come_in_order_and_the_stream_ends_with_the_job() -> None:
    assert [event async for event in ExclusiveJobs().stream(counting(100))] == list(range(100))


async def test_a_result_is_what_the_job_returns() -> None:
    assert await ExclusiveJobs().result(lambda job: "done") == "done"


async def test_jobs_run_one_at_a_time_in_the_order_they_came() -> None:
    jobs, log, running = ExclusiveJobs(), [], threading.Semaphore(1)

    def work(name: int):
        def run(job: Job[int]) -> None:
            assert running.acquire(blocking=False)
            log.append(name)
            for i in range(5):
                job.emit(i)
            running.release()

        return run

    async def follow(name: int) -> list[int]:
        return [event async for event in jobs.stream(work(name))]

    assert await asyncio.gather(*map(follow, range(8))) == [list(range(5))] * 8
    assert log == list(range(8))


async def test_what_a_job_raises_is_raised_after_its_events_and_the_next_one_runs() -> None:
    jobs, seen = ExclusiveJobs(), []

    def fails(job: Job[int]) -> None:
        job.emit(1)
        raise InvalidArgument("text", "too short")

    async def follow() -> None:
        async for event in jobs.stream(fails):
            seen.append(event)

    with pytest.raises(InvalidArgument) as refusal:
        await follow()
    assert (refusal.value.field, seen) == ("text", [1])
    assert await jobs.result(lambda job: 2) == 2


async def test_leaving_the_stream_ends_the_job_before_the_next_one_begins() -> None:
    jobs, ended = ExclusiveJobs(), threading.Event()

    def endless(job: Job[int]) -> None:
        try:
            while True:
                job.emit(0)
        except Cancelled:
            ended.set()
            raise

    async with aclosing(jobs.stream(endless)) as events:
        assert await anext(events) == 0
    assert ended.is_set()
    assert await jobs.result(lambda job: 1) == 1


async def test_a_task_that_is_cancelled_ends_its_job() -> None:
    jobs, begun, ended = ExclusiveJobs(), asyncio.Event(), threading.Event()
    loop = asyncio.get_running_loop()

    def endless(job: Job[int]) -> int:
        loop.call_soon_threadsafe(begun.set)
        try:
            while True:
                job.check()
        except Cancelled:
            ended.set()
            raise

    task = asyncio.create_task(jobs.result(endless))
    await begun.wait()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert ended.is_set()


async def numbers(n: int, log: list[str], closing: asyncio.Event | None = None) -> AsyncGenerator[int, None]:
    """A job that runs itself."""
    try:
        for i in range(n):
            await asyncio.sleep(0)
            yield i
    finally:
        if closing is not None:
            await closing.wait()
        log.append("numbers")


async def test_a_job_that_runs_itself_is_followed_to_its_end() -> None:
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
    assert await jobs.result(lambda job: 2) == 2


async def test_a_followed_job_is_over_before_the_next_one_begins_however_slowly_it_is_read() -> None:
    jobs, log = ExclusiveJobs(), []
    async with aclosing(jobs.follow(numbers(9, log))) as slowly:
        assert await anext(slowly) == 0
        await jobs.result(lambda job: log.append("the next one"))
        assert log == ["numbers", "the next one"]
        assert [number async for number in slowly] == list(range(1, 9))


async def test_leaving_a_followed_job_ends_it_before_the_next_one_begins() -> None:
    jobs, log, closing = ExclusiveJobs(), [], asyncio.Event()
    events = jobs.follow(numbers(10**9, log, closing))
    assert await anext(events) == 0
    leaving = asyncio.create_task(events.aclose())
    waiting = asyncio.create_task(jobs.result(lambda job: log.append("the next one")))
    for _ in range(9):
        await asyncio.sleep(0)
    assert not leaving.done()
    closing.set()
    await leaving
    await waiting
    assert log == ["numbers", "the next one"]


async def test_a_followed_job_that_is_left_before_its_turn_never_runs() -> None:
    jobs, log, release = ExclusiveJobs(), [], threading.Event()
    first = asyncio.create_task(jobs.result(lambda job: release.wait()))
    second = asyncio.create_task(anext(jobs.follow(numbers(1, log))))
    await asyncio.sleep(0)
    second.cancel()
    release.set()
    assert await first
    with pytest.raises(asyncio.CancelledError):
        await second
    assert await jobs.result(lambda job: "third") == "third"
    assert log == []


async def test_a_job_that_is_cancelled_while_it_waits_never_runs() -> None:
    jobs, release, ran = ExclusiveJobs(), threading.Event(), []
    first = asyncio.create_task(jobs.result(lambda job: release.wait()))
    second = asyncio.create_task(jobs.result(lambda job: ran.append("second")))
    third = asyncio.create_task(jobs.result(lambda job: "third"))
    await asyncio.sleep(0)
    second.cancel()
    release.set()
    assert await first
    assert await third == "third"
    assert second.cancelled()
    assert ran == []
