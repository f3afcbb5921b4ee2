"""Streams of the sync client. A stream that is closed early cancels its call."""

from collections.abc import Callable, Iterator
from queue import SimpleQueue
from threading import Lock
from types import TracebackType
from typing import Any, Generic, Protocol, Self, TypeVar

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


class EndingCall(Call[MessageT_co], Protocol[MessageT_co]):
    """One that tells when it has ended; False where it had before."""

    def add_callback(self, callback: Callable[[], None]) -> bool: ...


CallT = TypeVar("CallT", bound=EndingCall[Any])


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
        self, call: Call[generation_pb2.GenerateResponse], outbox: "Outbox[generation_pb2.SessionRequest]"
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


class Outbox(Generic[MessageT]):
    """What a session sends, beginning with `first`: until an attempt has been answered, the next sends it all again."""

    def __init__(self, first: MessageT) -> None:
        self._lock = Lock()
        self._sent = [first]
        self._is_answered = False
        self._queue: SimpleQueue[MessageT | None] = SimpleQueue()

    def attempt(self, begin: Callable[[Iterator[MessageT]], CallT]) -> CallT:
        """The call that `begin` makes of an iterator of the messages."""
        queue: SimpleQueue[MessageT | None] = SimpleQueue()
        with self._lock:
            self._queue = queue
            for message in self._sent:
                queue.put(message)
        call = begin(iter(queue.get, None))

        def end() -> None:
            queue.put(None)  # lets the thread that sends end with its call

        if not call.add_callback(end):
            end()
        return call

    def put(self, message: MessageT) -> None:
        with self._lock:
            if not self._is_answered:
                self._sent.append(message)
            self._queue.put(message)

    def answered(self) -> None:
        """There will be no further attempt."""
        with self._lock:
            self._is_answered = True
            self._sent.clear()
