"""A running call can be ended from outside: by the kill switch, or when the server ends."""

import asyncio
from collections.abc import Iterator
from contextlib import contextmanager

from patchclamp_server.errors import RequestError


class RunningCall:
    """Stands for the call of the current task."""

    def __init__(self) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._task = task
        self._killed = False

    def kill(self) -> None:
        """Cancels the call, once. It must be called in the event loop."""
        if not self._killed:
            self._killed = True
            self._task.cancel()

    @contextmanager
    def ending_with(self, error: RequestError) -> Iterator[None]:
        """Raises `error` out of the block if the call is killed. A client that goes away still cancels it."""
        try:
            yield
        except asyncio.CancelledError:
            if not self._killed:
                raise
            self._task.uncancel()
            raise error from None
