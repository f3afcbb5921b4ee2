"""How the sync client reaches its server: one channel, its stubs, and the calls on it."""

import copy
import time
from collections.abc import Callable, Iterator
from typing import Self

import grpc

from patchclamp.calls import Method, RequestT, ResponseT
from patchclamp.collectors import MessageT
from patchclamp.connection import HEALTH_METHOD, Connection, HealthRequest, HealthResponse
from patchclamp.errors import PatchclampError
from patchclamp.retry import Attempts, RepeatedCall, Retry
from patchclamp.streams import Call, EndingCall, Outbox
from patchclamp.v1.artifact_pb2_grpc import ArtifactServiceStub
from patchclamp.v1.generation_pb2_grpc import GenerationServiceStub
from patchclamp.v1.head_pb2_grpc import HeadServiceStub
from patchclamp.v1.job_pb2_grpc import JobServiceStub
from patchclamp.v1.model_pb2_grpc import ModelServiceStub
from patchclamp.v1.monitoring_pb2_grpc import MonitoringServiceStub
from patchclamp.v1.sparsity_pb2_grpc import SparsityServiceStub
from patchclamp.v1.steering_pb2_grpc import SteeringServiceStub


class Transport:
    """The base of Client."""

    def __init__(self, connection: Connection, retry: Retry) -> None:
        self._connection = connection
        self._retry = retry
        self._channel = _channel(connection, connection.options)
        # Asks for health where calls are balanced by it.
        self._health_channel = self._channel
        if connection.is_balanced:
            self._health_channel = _channel(connection, connection.health_options)
        self._owns_channel = True
        self._generation = GenerationServiceStub(self._channel)
        self._steering = SteeringServiceStub(self._channel)
        self._sparsity = SparsityServiceStub(self._channel)
        self._heads = HeadServiceStub(self._channel)
        self._monitoring = MonitoringServiceStub(self._channel)
        self._artifacts = ArtifactServiceStub(self._channel)
        self._models = ModelServiceStub(self._channel)
        self._jobs = JobServiceStub(self._channel)
        self._health = self._health_channel.unary_unary(
            HEALTH_METHOD, HealthRequest.SerializeToString, HealthResponse.FromString
        )

    def with_token(self, token: str | None) -> Self:
        """The same client on the same channel, for another caller. Closing it leaves the channel open.

        Raises ValueError for a token that would travel in clear.
        """
        other = copy.copy(self)
        other._connection = self._connection.with_token(token)
        other._owns_channel = False
        return other

    def close(self) -> None:
        """Cancels the calls that run. Nothing can be called afterwards."""
        if self._owns_channel:
            self._health_channel.close()
            self._channel.close()

    def _unary(self, method: Method[RequestT, ResponseT], request: RequestT, timeout: float | None) -> ResponseT:
        return self._repeated(method, lambda: request, timeout)

    def _repeated(
        self, method: Method[RequestT, ResponseT], make: Callable[[], RequestT], timeout: float | None
    ) -> ResponseT:
        """`make`: the request of each attempt."""
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


def _channel(connection: Connection, options: list[tuple[str, str | int]]) -> grpc.Channel:
    credentials = connection.credentials
    if credentials is None:
        return grpc.insecure_channel(connection.address, options)
    return grpc.secure_channel(connection.address, credentials, options)
