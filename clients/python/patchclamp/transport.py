# Generated from async_transport.py by clients/python/generate_sync.py; change async_transport.py.
"""How the synchronous client calls its server: with a deadline, with its token, and again where that may help."""

import copy
import time
from collections.abc import Callable, Iterator
from typing import Generic, Self

import grpc

from patchclamp.calls import Call, EndingCall, Method, RequestT, ResponseT, UnaryMethod
from patchclamp.collectors import MessageT
from patchclamp.connection import Connection
from patchclamp.errors import PatchclampError
from patchclamp.retry import Attempts, Retry
from patchclamp.stubs import Stubs
from patchclamp.threads import Cancellation, Link, Outbox


class Transport:
    """Calls the methods of the stubs. It is the base of Client."""

    def __init__(self, connection: Connection, retry: Retry) -> None:
        self._connection = connection
        self._retry = retry
        self._link = Link(connection)
        self._owns_link = True

    def with_token(self, token: str | None) -> Self:
        """Returns the same client on the same channel, for another caller. Closing it leaves the channel open.

        Raises ValueError for a token that would travel in clear.
        """
        other = copy.copy(self)
        other._connection = self._connection.with_token(token)
        other._owns_link = False
        return other

    def close(self) -> None:
        """Cancels the calls that run. Nothing can be called afterwards."""
        if self._owns_link:
            self._link.close()

    @property
    def _stubs(self) -> Stubs:
        return self._link.stubs()

    def _unary(self, method: UnaryMethod[RequestT, ResponseT], request: RequestT, timeout: float | None) -> ResponseT:
        return self._repeated(method, lambda: request, timeout)

    def _repeated(
        self, method: UnaryMethod[RequestT, ResponseT], make: Callable[[], RequestT], timeout: float | None
    ) -> ResponseT:
        """Calls until an attempt succeeds or there is none left. `make` makes the request of each attempt."""
        attempts = Attempts(self._retry, self._connection.deadline(timeout))
        while True:
            try:
                return method(make(), timeout=attempts.seconds_left(), metadata=self._connection.metadata)
            except grpc.RpcError as error:
                delay = attempts.delay(error)
                if delay is None:
                    raise PatchclampError.from_rpc(error) from None
                time.sleep(delay)

    def _stream(
        self, method: Method[RequestT, Call[MessageT]], request: RequestT, timeout: float | None
    ) -> Call[MessageT]:
        def begin(seconds: float | None) -> Call[MessageT]:
            return method(request, timeout=seconds, metadata=self._connection.metadata)

        return RepeatedCall(begin, Attempts(self._retry, self._connection.deadline(timeout)))

    def _session(
        self,
        method: Method[Iterator[RequestT], EndingCall[MessageT]],
        outbox: Outbox[RequestT],
        timeout: float | None,
    ) -> Call[MessageT]:
        def begin(seconds: float | None) -> Call[MessageT]:
            return outbox.attempt(lambda sent: method(sent, timeout=seconds, metadata=self._connection.metadata))

        return RepeatedCall(begin, Attempts(self._retry, self._connection.deadline(timeout)))


class RepeatedCall(Generic[MessageT]):
    """Makes a call that streams, and again by `begin` (with the seconds left) until its first message has come."""

    def __init__(self, begin: Callable[[float | None], Call[MessageT]], attempts: Attempts) -> None:
        self._begin = begin
        self._attempts = attempts
        self._cancellation = Cancellation()
        self._call = begin(attempts.seconds_left())

    def __iter__(self) -> Iterator[MessageT]:
        while True:
            messages = iter(self._call)
            try:
                first = next(messages)
            except StopIteration:
                return
            except grpc.RpcError as error:
                delay = self._attempts.delay(error)
                if delay is None or self._cancellation.comes_within(delay):
                    raise
                self._call = self._begin(self._attempts.seconds_left())
                # A cancellation that came while the call began has cancelled only the call before.
                if self._cancellation.is_set():
                    self._call.cancel()
                continue
            yield first
            yield from messages
            return

    def cancel(self) -> object:
        self._cancellation.set()
        return self._call.cancel()
