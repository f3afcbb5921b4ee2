"""Analysis jobs: one at a time, in their order, ended with their call."""

import asyncio
import threading
from contextlib import aclosing

import pytest

from patchclamp_server.errors import Cancelled, InvalidArgument
from patchclamp_server.rpc.exclusive import ExclusiveJobs, Job


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


async def test_a_job_that_runs_itself_has_a_turn_as_any_other() -> None:
    jobs, log = ExclusiveJobs(), []
    async with jobs.turn():
        waiting = asyncio.create_task(jobs.result(lambda job: log.append("the next one")))
        await asyncio.sleep(0)
        log.append("its own work")
    await waiting
    async with jobs.turn():
        log.append("and the turn comes back")
    assert log == ["its own work", "the next one", "and the turn comes back"]


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
