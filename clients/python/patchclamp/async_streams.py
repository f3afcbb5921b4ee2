"""Streams of the async client. A stream that is closed early, or whose task is cancelled, cancels its call."""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Generator
from types import TracebackType
from typing import Any, Generic, Protocol, Self, TypeVar

import grpc

from patchclamp import requests
from patchclamp.collectors import Collector, EventT, MessageT, ResultT, complete
from patchclamp.errors import PatchclampError
from patchclamp.results import Chunk, GenerateCollector, GenerateResult
from patchclamp.v1 import generation_pb2

MessageT_co = TypeVar("MessageT_co", covariant=True)


class AsyncCall(Protocol[MessageT_co]):
    """What a running call of gRPC offers."""

    def __aiter__(self) -> AsyncIterator[MessageT_co]: ...

    def cancel(self) -> bool: ...


class AsyncEndingCall(AsyncCall[MessageT_co], Protocol[MessageT_co]):
    """One that tells when it has ended."""

    def add_done_callback(self, callback: Callable[[Any], None]) -> None: ...


AsyncCallT = TypeVar("AsyncCallT", bound=AsyncEndingCall[Any])


class AsyncStream(Generic[MessageT, EventT, ResultT]):
    """Events of one call, in order; `result` collects the rest."""

    def __init__(self, call: AsyncCall[MessageT], collector: Collector[MessageT, EventT, ResultT]) -> None:
        self._call = call
        self._messages = aiter(call)
        self._collector = collector
        self._closed = False

    def __aiter__(self) -> AsyncIterator[EventT]:
        return self

    async def __anext__(self) -> EventT:
        if self._closed:
            raise StopAsyncIteration
        try:
            return self._collector.add(await anext(self._messages))
        except grpc.aio.AioRpcError as error:
            if self._closed:  # closed by another task while this one waited for the next attempt
                raise StopAsyncIteration from None
            raise PatchclampError.from_rpc(error) from None
        except asyncio.CancelledError:
            if self._closed and not _task_is_cancelled():  # closed by another task while this one waited
                raise StopAsyncIteration from None
            raise

    async def result(self, on_event: Callable[[EventT], object] | None = None) -> ResultT:
        """Reads to the end. `on_event` sees every event on the way."""
        async for event in self:
            if on_event is not None:
                on_event(event)
        return complete(self._collector.result())

    def close(self) -> Awaitable[None]:
        """Cancels the call if it is still running; iteration ends. It has done so whether or not it is awaited."""
        self._closed = True
        self._call.cancel()
        return _Done()

    async def aclose(self) -> None:
        """As `close`, for contextlib.aclosing and whatever else knows streams by this name."""
        await self.close()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()


class AsyncGenerateStream(AsyncStream[generation_pb2.GenerateResponse, Chunk, GenerateResult]):
    """Chunks of a generation; `text` is the same stream as pieces of text."""

    def __init__(self, call: AsyncCall[generation_pb2.GenerateResponse]) -> None:
        super().__init__(call, GenerateCollector())

    @property
    def text(self) -> AsyncIterator[str]:
        return (chunk.text async for chunk in self if chunk.text)


class AsyncSession(AsyncGenerateStream):
    """A generation whose strengths change while it runs. What is sent after the stream has ended has no effect."""

    def __init__(
        self,
        call: AsyncCall[generation_pb2.GenerateResponse],
        outbox: "AsyncOutbox[generation_pb2.SessionRequest]",
    ) -> None:
        super().__init__(call)
        self._outbox = outbox

    async def __anext__(self) -> Chunk:
        chunk = await super().__anext__()
        self._outbox.answered()
        return chunk

    async def set_strength(self, edit: str, strength: float) -> None:
        """Changes a named edit from the next token on."""
        self._outbox.put(requests.set_strength(edit, strength))

    async def advance(self, tokens: int = 1) -> None:
        """Grants tokens to a lockstep session."""
        self._outbox.put(requests.advance(tokens))

    async def stop(self) -> None:
        """Ends generation; the last chunk, with the receipt, still arrives."""
        self._outbox.put(requests.stop_session())


class _Done:
    """Lets others run once, so that they see what has been done."""

    def __await__(self) -> Generator[None, None, None]:
        yield


class AsyncOutbox(Generic[MessageT]):
    """As Outbox, in an event loop."""

    def __init__(self, first: MessageT) -> None:
        self._sent = [first]
        self._is_answered = False
        self._queue: asyncio.Queue[MessageT | None] = asyncio.Queue()

    def attempt(self, begin: Callable[[AsyncIterator[MessageT]], AsyncCallT]) -> AsyncCallT:
        """The call that `begin` makes of an iterator of the messages."""
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
        """There will be no further attempt."""
        self._is_answered = True
        self._sent.clear()


async def _until_none(queue: asyncio.Queue[MessageT | None]) -> AsyncIterator[MessageT]:
    while (message := await queue.get()) is not None:
        yield message


def _task_is_cancelled() -> bool:
    task = asyncio.current_task()
    return task is not None and task.cancelling() > 0
