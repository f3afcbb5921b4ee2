"""What the synchronous client does with threads; tasks.py has the same for the asynchronous one."""

from collections.abc import Callable, Iterator
from queue import SimpleQueue
from threading import Event, Lock
from typing import Any, Generic, TypeVar

import grpc

from patchclamp.calls import Call, EndingCall
from patchclamp.collectors import MessageT
from patchclamp.connection import Connection
from patchclamp.errors import PatchclampError
from patchclamp.stubs import Stubs

EndingCallT = TypeVar("EndingCallT", bound=EndingCall[Any])


class Link:
    """Keeps the stubs of one channel, which all threads share."""

    def __init__(self, connection: Connection) -> None:
        self._stubs = Stubs(connection)

    def stubs(self) -> Stubs:
        return self._stubs

    def close(self) -> None:
        self._stubs.close()


class Cancellation(Event):
    """Is set when a call has been cancelled."""

    def comes_within(self, seconds: float) -> bool:
        """Waits until the call is cancelled, at most this long, and returns whether it was."""
        return self.wait(seconds)


class Reader(Generic[MessageT]):
    """Reads the messages of one call until it ends or another thread closes it."""

    def __init__(self, call: Call[MessageT]) -> None:
        self._call = call
        self._messages = iter(call)
        self._closed = False

    def _next_message(self) -> MessageT:
        """Returns the next message. Raises StopIteration after the last one, and once the call is closed."""
        if self._closed:
            raise StopIteration
        try:
            return next(self._messages)
        except grpc.RpcError as error:
            if self._closed:  # closed from another thread while this one waited
                raise StopIteration from None
            raise PatchclampError.from_rpc(error) from None

    def close(self) -> None:
        """Cancels the call if it is still running; iteration ends."""
        self._closed = True
        self._call.cancel()


class Outbox(Generic[MessageT]):
    """Keeps what a session sends, beginning with `first`, until an attempt is answered: the next sends it all again."""

    def __init__(self, first: MessageT) -> None:
        self._lock = Lock()
        self._sent = [first]
        self._is_answered = False
        self._queue: SimpleQueue[MessageT | None] = SimpleQueue()

    def attempt(self, begin: Callable[[Iterator[MessageT]], EndingCallT]) -> EndingCallT:
        """Returns the call that `begin` makes of an iterator of the messages."""
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
        """Tells that there will be no further attempt."""
        with self._lock:
            self._is_answered = True
            self._sent.clear()
