"""Streams of the sync client. A stream that is closed early cancels its call."""

from collections.abc import Callable, Iterator
from queue import SimpleQueue
from types import TracebackType
from typing import Generic, Protocol, Self, TypeVar

import grpc

from patchclamp import requests
from patchclamp.collectors import Collector, EventT, MessageT, ResultT, complete
from patchclamp.errors import PatchclampError
from patchclamp.results import Chunk, GenerateCollector, GenerateResult
from patchclamp.v1 import generation_pb2

MessageT_co = TypeVar("MessageT_co", covariant=True)


class Call(Protocol[MessageT_co]):
    """What a running call of gRPC offers."""

    def __iter__(self) -> Iterator[MessageT_co]: ...

    def cancel(self) -> object: ...

    def add_callback(self, callback: Callable[[], None]) -> bool: ...


class Stream(Generic[MessageT, EventT, ResultT]):
    """Events of one call, in order; `result` collects the rest."""

    def __init__(self, call: Call[MessageT], collector: Collector[MessageT, EventT, ResultT]) -> None:
        self._call = call
        self._messages = iter(call)
        self._collector = collector
        self._closed = False

    def __iter__(self) -> Iterator[EventT]:
        return self

    def __next__(self) -> EventT:
        if self._closed:
            raise StopIteration
        try:
            return self._collector.add(next(self._messages))
        except grpc.RpcError as error:
            if self._closed:  # closed from another thread while this one waited
                raise StopIteration from None
            raise PatchclampError.from_rpc(error) from None

    def result(self, on_event: Callable[[EventT], object] | None = None) -> ResultT:
        """Reads to the end. `on_event` sees every event on the way."""
        for event in self:
            if on_event is not None:
                on_event(event)
        return complete(self._collector.result())

    def close(self) -> None:
        """Cancels the call if it is still running; iteration ends."""
        self._closed = True
        self._call.cancel()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()


class GenerateStream(Stream[generation_pb2.GenerateResponse, Chunk, GenerateResult]):
    """Chunks of a generation; `text` is the same stream as pieces of text."""

    def __init__(self, call: Call[generation_pb2.GenerateResponse]) -> None:
        super().__init__(call, GenerateCollector())

    @property
    def text(self) -> Iterator[str]:
        return (chunk.text for chunk in self if chunk.text)


class Session(GenerateStream):
    """A generation whose strengths change while it runs. What is sent after the stream has ended has no effect."""

    def __init__(
        self,
        call: Call[generation_pb2.GenerateResponse],
        outbox: SimpleQueue[generation_pb2.SessionRequest | None],
    ) -> None:
        super().__init__(call)
        self._outbox = outbox
        if not call.add_callback(self._end_outbox):
            self._end_outbox()

    def set_strength(self, edit: str, strength: float) -> None:
        """Changes a named edit from the next token on."""
        self._outbox.put(requests.set_strength(edit, strength))

    def advance(self, tokens: int = 1) -> None:
        """Grants tokens to a lockstep session."""
        self._outbox.put(requests.advance(tokens))

    def stop(self) -> None:
        """Ends generation; the last chunk, with the receipt, still arrives."""
        self._outbox.put(requests.stop_session())

    def _end_outbox(self) -> None:
        self._outbox.put(None)  # lets the thread that sends end with the call
