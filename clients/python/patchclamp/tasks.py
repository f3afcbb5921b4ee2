"""What the asynchronous client does with tasks and event loops; threads.py has the same for the synchronous one."""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Generator
from typing import Any, Generic, TypeVar

import grpc

from patchclamp.async_stubs import AsyncStubs
from patchclamp.calls import AsyncCall, AsyncEndingCall
from patchclamp.collectors import MessageT
from patchclamp.connection import Connection
from patchclamp.errors import PatchclampError

EndingCallT = TypeVar("EndingCallT", bound=AsyncEndingCall[Any])


class AsyncLink:
    """Keeps the stubs of the event loop that runs when one is first asked for: a channel of gRPC belongs to one loop.

    A client may so be made before any loop runs, and outlive the loop that it was used in.
    """

    def __init__(self, connection: Connection) -> None:
        self._connection = connection
        self._loop: asyncio.AbstractEventLoop | None = None
        self._closed = False

    def stubs(self) -> AsyncStubs:
        """Returns the stubs of the running event loop. Raises ValueError after `close`."""
        if self._closed:
            raise ValueError("the client is closed")
        loop = asyncio.get_running_loop()
        if self._loop is not loop:
            self._loop = loop
            self._stubs = AsyncStubs(self._connection)
        return self._stubs

    async def close(self) -> None:
        self._closed = True
        # The channel of another loop has ended with it.
        if self._loop is asyncio.get_running_loop():
            await self._stubs.close()


class AsyncCancellation(asyncio.Event):
    """Is set when a call has been cancelled."""

    async def comes_within(self, seconds: float) -> bool:
        """Waits until the call is cancelled, at most this long, and returns whether it was."""
        try:
            await asyncio.wait_for(self.wait(), seconds)
        except TimeoutError:
            return False
        return True


class AsyncReader(Generic[MessageT]):
    """Reads the messages of one call until it ends or another task closes it."""

    def __init__(self, call: AsyncCall[MessageT]) -> None:
        self._call = call
        self._messages = aiter(call)
        self._closed = False

    async def _next_message(self) -> MessageT:
        """Returns the next message. Raises StopAsyncIteration after the last one, and once the call is closed."""
        if self._closed:
            raise StopAsyncIteration
        try:
            return await anext(self._messages)
        except grpc.aio.AioRpcError as error:
            if self._closed:  # closed by another task while this one waited for the next attempt
                raise StopAsyncIteration from None
            raise PatchclampError.from_rpc(error) from None
        except asyncio.CancelledError:
            if self._closed and not _task_is_cancelled():  # closed by another task while this one waited
                raise StopAsyncIteration from None
            raise

    def close(self) -> Awaitable[None]:
        """Cancels the call if it is still running; iteration ends. It has done so whether or not it is awaited."""
        self._closed = True
        self._call.cancel()
        return _Done()

    async def aclose(self) -> None:
        """Does what `close` does, for contextlib.aclosing and whatever else knows streams by this name."""
        await self.close()


class AsyncOutbox(Generic[MessageT]):
    """Keeps what a session sends, beginning with `first`, until an attempt is answered: the next sends it all again."""

    def __init__(self, first: MessageT) -> None:
        self._sent = [first]
        self._is_answered = False
        self._queue: asyncio.Queue[MessageT | None] = asyncio.Queue()

    def attempt(self, begin: Callable[[AsyncIterator[MessageT]], EndingCallT]) -> EndingCallT:
        """Returns the call that `begin` makes of an iterator of the messages."""
        queue: asyncio.Queue[MessageT | None] = asyncio.Queue()
        self._queue = queue
        for message in self._sent:
            queue.put_nowait(message)
        call = begin(_until_none(queue))
        # Lets the task that sends end with its call: gRPC leaves it waiting.
        call.add_done_callback(lambda _: queue.put_nowait(None))
        return call

    def put(self, message: MessageT) -> None:
        if not self._is_answered:
            self._sent.append(message)
        self._queue.put_nowait(message)

    def answered(self) -> None:
        """Tells that there will be no further attempt."""
        self._is_answered = True
        self._sent.clear()


class _Done:
    """Lets others run once, so that they see what has been done."""

    def __await__(self) -> Generator[None, None, None]:
        yield


async def _until_none(queue: asyncio.Queue[MessageT | None]) -> AsyncIterator[MessageT]:
    while (message := await queue.get()) is not None:
        yield message


def _task_is_cancelled() -> bool:
    task = asyncio.current_task()
    return task is not None and task.cancelling() > 0
