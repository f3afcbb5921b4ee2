"""Analysis jobs that compute in a thread of their own: one at a time for the whole server, others wait in their order.

Two at once would take each other's cores and memory, and serving has to live beside them.
"""

import asyncio
import logging
import threading
from collections.abc import AsyncGenerator, Callable
from contextlib import aclosing
from typing import Any, Generic, TypeVar

from patchclamp_server.engine.call_observer import OBSERVER
from patchclamp_server.errors import Cancelled, RequestError

logger = logging.getLogger(__name__)

E = TypeVar("E")
_END: Any = object()


class Job(Generic[E]):
    """The side of a job that its thread sees."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop
        self._events: asyncio.Queue[E] = asyncio.Queue()
        self._left = threading.Event()

    def emit(self, event: E) -> None:
        """Sends an event to the call. Raises Cancelled when nobody waits for it any more."""
        self.check()
        self._put(event)

    def check(self) -> None:
        """Raises Cancelled when nobody waits for the job any more. To be called often."""
        if self._left.is_set():
            raise Cancelled("", "the call has ended")

    def run(self, work: "Callable[[Job[E]], None]") -> None:
        """In the job's thread."""
        try:
            self.check()
            work(self)
        finally:
            self._put(_END)

    def leave(self) -> None:
        self._left.set()

    async def next(self) -> E:
        return await self._events.get()

    def _put(self, event: E) -> None:
        self._loop.call_soon_threadsafe(self._events.put_nowait, event)


class ExclusiveJobs:
    """The queue of the jobs of one server, for one event loop."""

    def __init__(self) -> None:
        self._turn = asyncio.Lock()

    async def stream(self, work: Callable[[Job[E]], None]) -> AsyncGenerator[E, None]:
        """The events that `work` emits, once it is its turn; raises what it raises.

        Ending the iteration early, or cancelling the task, ends the job at its next emit or check, and returns when its
        thread is done. The next job begins then, and not before.
        """
        await self._turn.acquire()
        _tell_observer()
        job: Job[E] = Job(asyncio.get_running_loop())
        thread = asyncio.ensure_future(asyncio.to_thread(job.run, work))
        thread.add_done_callback(self._end)
        try:
            while (event := await job.next()) is not _END:
                yield event
            await thread
        finally:
            job.leave()
            await asyncio.wait([thread])

    async def follow(self, job: AsyncGenerator[E, None]) -> AsyncGenerator[E, None]:
        """The events of a job that has a thread of its own; as `stream` in all else.

        The job goes on however slowly they are taken, since others wait for its turn to end.
        """
        taken: asyncio.Queue[E] = asyncio.Queue()

        async def run() -> None:
            try:
                async with self._turn, aclosing(job) as events:
                    _tell_observer()
                    async for event in events:
                        taken.put_nowait(event)
            finally:
                taken.put_nowait(_END)

        running = asyncio.create_task(run())
        running.add_done_callback(_log_failure)
        try:
            while (event := await taken.get()) is not _END:
                yield event
            await running
        finally:
            running.cancel()
            await asyncio.wait([running])

    async def result(self, work: Callable[[Job[E]], E]) -> E:
        """What `work` returns; as `stream` in all else."""

        def emit_result(job: Job[E]) -> None:
            job.emit(work(job))

        async with aclosing(self.stream(emit_result)) as events:
            return await anext(events)

    def _end(self, thread: "asyncio.Future[None]") -> None:
        """Even if nobody waits for the thread any more, its turn is over."""
        self._turn.release()
        _log_failure(thread)


def _tell_observer() -> None:
    if (observer := OBSERVER.get()) is not None:
        observer.job_begins()


def _log_failure(job: "asyncio.Future[None]") -> None:
    """Even if nobody waits for the job any more, no failure goes unseen."""
    error = None if job.cancelled() else job.exception()
    if error is not None and not isinstance(error, RequestError):
        logger.error("an analysis job failed", exc_info=error)
