"""Streams of the asynchronous client. A stream that is closed early, or whose task is cancelled, cancels its call."""

from collections.abc import AsyncIterator, Callable
from types import TracebackType
from typing import Generic, Self

from patchclamp import requests
from patchclamp.calls import AsyncCall
from patchclamp.collectors import Collector, EventT, MessageT, ResultT, complete
from patchclamp.results import Chunk, GenerateCollector, GenerateResult
from patchclamp.tasks import AsyncOutbox, AsyncReader
from patchclamp.v1 import generation_pb2


class AsyncStream(AsyncReader[MessageT], Generic[MessageT, EventT, ResultT]):
    """Yields the events of one call, in order; `result` collects the rest."""

    def __init__(self, call: AsyncCall[MessageT], collector: Collector[MessageT, EventT, ResultT]) -> None:
        super().__init__(call)
        self._collector = collector

    def __aiter__(self) -> AsyncIterator[EventT]:
        return self

    async def __anext__(self) -> EventT:
        return self._collector.add(await self._next_message())

    async def result(self, on_event: Callable[[EventT], object] | None = None) -> ResultT:
        """Reads to the end. `on_event` sees every event on the way."""
        async for event in self:
            if on_event is not None:
                on_event(event)
        return complete(self._collector.result())

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()


class AsyncGenerateStream(AsyncStream[generation_pb2.GenerateResponse, Chunk, GenerateResult]):
    """Yields the chunks of a generation; `text` is the same stream as pieces of text."""

    def __init__(self, call: AsyncCall[generation_pb2.GenerateResponse]) -> None:
        super().__init__(call, GenerateCollector())

    @property
    def text(self) -> AsyncIterator[str]:
        return (chunk.text async for chunk in self if chunk.text)


class AsyncSession(AsyncGenerateStream):
    """Streams a generation whose strengths can change while it runs. What is sent after its end has no effect."""

    def __init__(
        self, call: AsyncCall[generation_pb2.GenerateResponse], outbox: AsyncOutbox[generation_pb2.SessionRequest]
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
