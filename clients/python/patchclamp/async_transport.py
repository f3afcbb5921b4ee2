"""How the asynchronous client calls its server: with a deadline, with its token, and again where that may help."""

import asyncio
import copy
from collections.abc import AsyncIterator, Callable
from typing import Generic, Self

import grpc

from patchclamp.async_stubs import AsyncStubs
from patchclamp.calls import AsyncCall, AsyncEndingCall, AsyncUnaryMethod, Method, RequestT, ResponseT
from patchclamp.collectors import MessageT
from patchclamp.connection import Connection
from patchclamp.errors import PatchclampError
from patchclamp.retry import Attempts, Retry
from patchclamp.tasks import AsyncCancellation, AsyncLink, AsyncOutbox


class AsyncTransport:
    """Calls the methods of the stubs. It is the base of AsyncClient."""

    def __init__(self, connection: Connection, retry: Retry) -> None:
        self._connection = connection
        self._retry = retry
        self._link = AsyncLink(connection)
        self._owns_link = True

    def with_token(self, token: str | None) -> Self:
        """Returns the same client on the same channel, for another caller. Closing it leaves the channel open.

        Raises ValueError for a token that would travel in clear.
        """
        other = copy.copy(self)
        other._connection = self._connection.with_token(token)
        other._owns_link = False
        return other

    async def close(self) -> None:
        """Cancels the calls that run. Nothing can be called afterwards."""
        if self._owns_link:
            await self._link.close()

    aclose = close

    @property
    def _stubs(self) -> AsyncStubs:
        return self._link.stubs()

    async def _unary(
        self, method: AsyncUnaryMethod[RequestT, ResponseT], request: RequestT, timeout: float | None
    ) -> ResponseT:
        return await self._repeated(method, lambda: request, timeout)

    async def _repeated(
        self, method: AsyncUnaryMethod[RequestT, ResponseT], make: Callable[[], RequestT], timeout: float | None
    ) -> ResponseT:
        """Calls until an attempt succeeds or there is none left. `make` makes the request of each attempt."""
        attempts = Attempts(self._retry, self._connection.deadline(timeout))
        while True:
            try:
                return await method(make(), timeout=attempts.seconds_left(), metadata=self._connection.metadata)
            except grpc.aio.AioRpcError as error:
                delay = attempts.delay(error)
                if delay is None:
                    raise PatchclampError.from_rpc(error) from None
                await asyncio.sleep(delay)

    def _stream(
        self, method: Method[RequestT, AsyncCall[MessageT]], request: RequestT, timeout: float | None
    ) -> AsyncCall[MessageT]:
        def begin(seconds: float | None) -> AsyncCall[MessageT]:
            return method(request, timeout=seconds, metadata=self._connection.metadata)

        return AsyncRepeatedCall(begin, Attempts(self._retry, self._connection.deadline(timeout)))

    def _session(
        self,
        method: Method[AsyncIterator[RequestT], AsyncEndingCall[MessageT]],
        outbox: AsyncOutbox[RequestT],
        timeout: float | None,
    ) -> AsyncCall[MessageT]:
        def begin(seconds: float | None) -> AsyncCall[MessageT]:
            return outbox.attempt(lambda sent: method(sent, timeout=seconds, metadata=self._connection.metadata))

        return AsyncRepeatedCall(begin, Attempts(self._retry, self._connection.deadline(timeout)))


class AsyncRepeatedCall(Generic[MessageT]):
    """Makes a call that streams, and again by `begin` (with the seconds left) until its first message has come."""

    def __init__(self, begin: Callable[[float | None], AsyncCall[MessageT]], attempts: Attempts) -> None:
        self._begin = begin
        self._attempts = attempts
        self._cancellation = AsyncCancellation()
        self._call = begin(attempts.seconds_left())

    async def __aiter__(self) -> AsyncIterator[MessageT]:
        while True:
            messages = aiter(self._call)
            try:
                first = await anext(messages)
            except StopAsyncIteration:
                return
            except grpc.aio.AioRpcError as error:
                delay = self._attempts.delay(error)
                if delay is None or await self._cancellation.comes_within(delay):
                    raise
                self._call = self._begin(self._attempts.seconds_left())
                # A cancellation that came while the call began has cancelled only the call before.
                if self._cancellation.is_set():
                    self._call.cancel()
                continue
            yield first
            async for message in messages:
                yield message
            return

    def cancel(self) -> object:
        self._cancellation.set()
        return self._call.cancel()
