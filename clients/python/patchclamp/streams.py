# Generated from async_streams.py by clients/python/generate_sync.py; change async_streams.py.
"""Streams of the synchronous client. A stream that is closed early cancels its call."""

from collections.abc import Callable, Iterator
from types import TracebackType
from typing import Generic, Self

from patchclamp import requests
from patchclamp.calls import Call
from patchclamp.collectors import Collector, EventT, MessageT, ResultT, complete
from patchclamp.results import Chunk, GenerateCollector, GenerateResult
from patchclamp.threads import Outbox, Reader
from patchclamp.v1 import generation_pb2


class Stream(Reader[MessageT], Generic[MessageT, EventT, ResultT]):
    """Yields the events of one call, in order; `result` collects the rest."""

    def __init__(self, call: Call[MessageT], collector: Collector[MessageT, EventT, ResultT]) -> None:
        super().__init__(call)
        self._collector = collector

    def __iter__(self) -> Iterator[EventT]:
        return self

    def __next__(self) -> EventT:
        return self._collector.add(self._next_message())

    def result(self, on_event: Callable[[EventT], object] | None = None) -> ResultT:
        """Reads to the end. `on_event` sees every event on the way."""
        for event in self:
            if on_event is not None:
                on_event(event)
        return complete(self._collector.result())

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()


class GenerateStream(Stream[generation_pb2.GenerateResponse, Chunk, GenerateResult]):
    """Yields the chunks of a generation; `text` is the same stream as pieces of text."""

    def __init__(self, call: Call[generation_pb2.GenerateResponse]) -> None:
        super().__init__(call, GenerateCollector())

    @property
    def text(self) -> Iterator[str]:
        return (chunk.text for chunk in self if chunk.text)


class Session(GenerateStream):
    """Streams a generation whose strengths can change while it runs. What is sent after its end has no effect."""

    def __init__(
        self, call: Call[generation_pb2.GenerateResponse], outbox: Outbox[generation_pb2.SessionRequest]
    ) -> None:
        super().__init__(call)
        self._outbox = outbox

    def __next__(self) -> Chunk:
        chunk = super().__next__()
        self._outbox.answered()
        return chunk

    def set_strength(self, edit: str, strength: float) -> None:
        """Changes a named edit from the next token on."""
        self._outbox.put(requests.set_strength(edit, strength))

    def advance(self, tokens: int = 1) -> None:
        """Grants tokens to a lockstep session."""
        self._outbox.put(requests.advance(tokens))

    def stop(self) -> None:
        """Ends generation; the last chunk, with the receipt, still arrives."""
        self._outbox.put(requests.stop_session())
