"""Templates and tokenizers have threads of their own, so that no long text keeps other calls from their threads.

Work in them ends with the call that asked for it: between two renderings, or before the next text, it checks whether
anybody still waits (`check_awaited`).
"""

import asyncio
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextvars import ContextVar, copy_context
from dataclasses import dataclass, field
from functools import partial
from typing import ParamSpec, TypeVar

from patchclamp_server.errors import Cancelled, DeadlineExceeded

P = ParamSpec("P")
T = TypeVar("T")

# This is enough to keep the cores busy; the engine's thread needs them too.
THREADS = 4
# This is far longer than the longest text that fits a context takes, including its wait for a thread.
MOST_SECONDS = 60.0


@dataclass(frozen=True)
class _Waiting:
    """Tells whether somebody still waits for a piece of work (`left`), and since when, on the clock of
    time.monotonic()."""

    most_seconds: float
    since: float = field(default_factory=time.monotonic)
    left: threading.Event = field(default_factory=threading.Event)


_WAITING: ContextVar[_Waiting | None] = ContextVar("waiting", default=None)


def check_awaited() -> None:
    """Raises Cancelled when the call that this work is for has ended, DeadlineExceeded when it takes too long.

    It does nothing in work that no TextThreads run.
    """
    waiting = _WAITING.get()
    if waiting is None:
        return
    if waiting.left.is_set():
        raise Cancelled("", "the call has ended")
    if time.monotonic() - waiting.since > waiting.most_seconds:
        raise DeadlineExceeded("", f"the text was not read within {waiting.most_seconds:g} s")


class TextThreads:
    def __init__(self, name: str, threads: int = THREADS, most_seconds: float = MOST_SECONDS) -> None:
        self._pool = ThreadPoolExecutor(threads, thread_name_prefix=f"patchclamp-{name}")
        self._most_seconds = most_seconds

    async def run(self, work: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        """Runs `work` in one of the threads with the caller's context and returns its result. When the caller's task
        ends, the work ends at its next `check_awaited`."""
        waiting = _Waiting(self._most_seconds)
        context = copy_context()
        context.run(_WAITING.set, waiting)

        def run() -> T:
            check_awaited()
            return work(*args, **kwargs)

        try:
            return await asyncio.get_running_loop().run_in_executor(self._pool, partial(context.run, run))
        finally:
            waiting.left.set()

    def close(self) -> None:
        """Starts no further work; work that runs ends with its call."""
        self._pool.shutdown(wait=False, cancel_futures=True)
