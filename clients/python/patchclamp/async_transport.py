"""How the async client reaches its server: one channel for each event loop, its stubs, and the calls on it."""

import asyncio
import copy
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import TYPE_CHECKING, Any, Self

import grpc

from patchclamp.async_streams import AsyncCall, AsyncEndingCall, AsyncOutbox
from patchclamp.calls import Method, RequestT, ResponseT
from patchclamp.collectors import MessageT
from patchclamp.connection import HEALTH_METHOD, Connection, HealthRequest, HealthResponse
from patchclamp.errors import PatchclampError
from patchclamp.retry import AsyncRepeatedCall, Attempts, Retry
from patchclamp.v1.artifact_pb2_grpc import ArtifactServiceStub
from patchclamp.v1.generation_pb2_grpc import GenerationServiceStub
from patchclamp.v1.head_pb2_grpc import HeadServiceStub
from patchclamp.v1.job_pb2_grpc import JobServiceStub
from patchclamp.v1.model_pb2_grpc import ModelServiceStub
from patchclamp.v1.monitoring_pb2_grpc import MonitoringServiceStub
from patchclamp.v1.sparsity_pb2_grpc import SparsityServiceStub
from patchclamp.v1.steering_pb2_grpc import SteeringServiceStub

if TYPE_CHECKING:
    from patchclamp.v1.artifact_pb2_grpc import ArtifactServiceAsyncStub
    from patchclamp.v1.generation_pb2_grpc import GenerationServiceAsyncStub
    from patchclamp.v1.head_pb2_grpc import HeadServiceAsyncStub
    from patchclamp.v1.job_pb2_grpc import JobServiceAsyncStub
    from patchclamp.v1.model_pb2_grpc import ModelServiceAsyncStub
    from patchclamp.v1.monitoring_pb2_grpc import MonitoringServiceAsyncStub
    from patchclamp.v1.sparsity_pb2_grpc import SparsityServiceAsyncStub
    from patchclamp.v1.steering_pb2_grpc import SteeringServiceAsyncStub


class _Channel:
    """Of the event loop that runs when something is first asked of it: a channel of gRPC belongs to one loop.

    A client may so be made before any loop runs, and outlive the loop that it was used in.
    """

    def __init__(self, connection: Connection) -> None:
        self._connection = connection
        self._loop: asyncio.AbstractEventLoop | None = None
        self._closed = False

    def use(self) -> grpc.aio.Channel:
        return self._used()[0]

    def use_for_health(self) -> grpc.aio.Channel:
        return self._used()[1]

    def _used(self) -> tuple[grpc.aio.Channel, grpc.aio.Channel]:
        if self._closed:
            raise ValueError("the client is closed")
        loop = asyncio.get_running_loop()
        if self._loop is not loop:
            self._loop = loop
            channel = _channel(self._connection, self._connection.options)
            # Asks for health where calls are balanced by it.
            health = channel
            if self._connection.is_balanced:
                health = _channel(self._connection, self._connection.health_options)
            self._channels = channel, health
        return self._channels

    async def close(self) -> None:
        self._closed = True
        # The channel of another loop has ended with it.
        if self._loop is asyncio.get_running_loop():
            for channel in self._channels:
                await channel.close(None)


class AsyncTransport:
    """The base of AsyncClient."""

    def __init__(self, connection: Connection, retry: Retry) -> None:
        self._connection = connection
        self._retry = retry
        self._channel = _Channel(connection)
        self._owns_channel = True

    def with_token(self, token: str | None) -> Self:
        """The same client on the same channel, for another caller. Closing it leaves the channel open.

        Raises ValueError for a token that would travel in clear.
        """
        other = copy.copy(self)
        other._connection = self._connection.with_token(token)
        other._owns_channel = False
        return other

    async def close(self) -> None:
        """Cancels the calls that run. Nothing can be called afterwards."""
        if self._owns_channel:
            await self._channel.close()

    aclose = close

    @property
    def _generation(self) -> "GenerationServiceAsyncStub":
        return GenerationServiceStub(self._channel.use())

    @property
    def _steering(self) -> "SteeringServiceAsyncStub":
        return SteeringServiceStub(self._channel.use())

    @property
    def _sparsity(self) -> "SparsityServiceAsyncStub":
        return SparsityServiceStub(self._channel.use())

    @property
    def _heads(self) -> "HeadServiceAsyncStub":
        return HeadServiceStub(self._channel.use())

    @property
    def _monitoring(self) -> "MonitoringServiceAsyncStub":
        return MonitoringServiceStub(self._channel.use())

    @property
    def _artifacts(self) -> "ArtifactServiceAsyncStub":
        return ArtifactServiceStub(self._channel.use())

    @property
    def _jobs(self) -> "JobServiceAsyncStub":
        return JobServiceStub(self._channel.use())

    @property
    def _models(self) -> "ModelServiceAsyncStub":
        return ModelServiceStub(self._channel.use())

    @property
    def _health(self) -> "grpc.aio.UnaryUnaryMultiCallable[Any, Any]":
        channel = self._channel.use_for_health()
        return channel.unary_unary(HEALTH_METHOD, HealthRequest.SerializeToString, HealthResponse.FromString)

    async def _unary(
        self, method: Method[RequestT, Awaitable[ResponseT]], request: RequestT, timeout: float | None
    ) -> ResponseT:
        return await self._repeated(method, lambda: request, timeout)

    async def _repeated(
        self, method: Method[RequestT, Awaitable[ResponseT]], make: Callable[[], RequestT], timeout: float | None
    ) -> ResponseT:
        """`make`: the request of each attempt."""
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


def _channel(connection: Connection, options: list[tuple[str, str | int]]) -> grpc.aio.Channel:
    credentials = connection.credentials
    if credentials is None:
        return grpc.aio.insecure_channel(connection.address, options)
    return grpc.aio.secure_channel(connection.address, credentials, options)
