"""The gRPC service behind this front. Every call is made for the caller of HTTP: with its token, deadline and trace."""

import math
from collections.abc import AsyncIterator, Mapping
from dataclasses import dataclass
from typing import Any

import grpc

from patchclamp.async_stubs import AsyncStubs
from patchclamp.connection import Connection, HealthRequest, health_status
from patchclamp.errors import PatchclampError
from patchclamp.tasks import AsyncLink
from patchclamp.v1 import model_pb2
from patchclamp_http.errors import invalid

# What a caller says of itself and of its trace travels on as it is.
PASSED_ON = ("authorization", "traceparent", "tracestate", "baggage")
# Milliseconds until the caller gives up; the first is that of the Connect protocol.
DEADLINE_HEADERS = ("connect-timeout-ms", "x-request-timeout-ms")
HEALTH_SECONDS = 5.0


@dataclass(frozen=True)
class Options:
    """Of one call: metadata, and seconds until its deadline or None."""

    metadata: tuple[tuple[str, str], ...]
    timeout: float | None

    def arguments(self) -> dict[str, Any]:
        """Returns them as a method of a stub takes them."""
        return {"metadata": self.metadata, "timeout": self.timeout}


class Upstream:
    """One channel for all callers: gRPC runs many calls on it at once."""

    def __init__(self, connection: Connection) -> None:
        """Raises ValueError where the tokens of callers would travel in clear to another host."""
        # The front has no token of its own, which whoever brings none would be served with.
        connection.with_token("a caller's")
        self._connection = connection.with_token(None)
        self._link = AsyncLink(self._connection)
        self._model_name = ""

    @property
    def stubs(self) -> AsyncStubs:
        return self._link.stubs()

    async def close(self) -> None:
        await self._link.close()

    def options(self, headers: Mapping[str, str]) -> Options:
        """Returns what headers, in lower case, say of a call. Raises ApiError for what gRPC cannot carry."""
        metadata = tuple((name, headers[name]) for name in PASSED_ON if name in headers)
        for name, value in metadata:
            if not (value.isascii() and value.isprintable()):
                raise invalid(name, "expected printable characters of ASCII")
        timeout = self._connection.deadline(None)
        for name in DEADLINE_HEADERS:
            if name in headers:
                timeout = _seconds(name, headers[name])
        return Options(metadata, timeout)

    async def models(self, options: Options) -> list[model_pb2.Model]:
        """Returns what is served. Raises PatchclampError."""
        listed = await answer(self.stubs.models.ListModels(model_pb2.ListModelsRequest(), **options.arguments()))
        models: list[model_pb2.Model] = list(listed.models)
        return models

    async def model_name(self, options: Options) -> str:
        """Returns what a request is answered by that names no model, as it was when a caller first asked: a server has
        the model that it starts with."""
        self._model_name = self._model_name or (await self.models(options))[0].name
        return self._model_name

    async def health(self) -> str:
        """Returns "serving", or why not."""
        try:
            return health_status(await self.stubs.health(HealthRequest(), timeout=HEALTH_SECONDS))
        except grpc.aio.AioRpcError as error:
            return error.code().name.lower()


async def answer(call: Any) -> Any:
    """Returns the message of a call with one answer. Raises PatchclampError."""
    try:
        return await call
    except grpc.aio.AioRpcError as error:
        raise PatchclampError.from_rpc(error) from None


async def messages(call: Any) -> AsyncIterator[Any]:
    """Yields the messages of a call that streams, and cancels it when they are no longer wanted. Raises
    PatchclampError."""
    try:
        async for message in call:
            yield message
    except grpc.aio.AioRpcError as error:
        raise PatchclampError.from_rpc(error) from None
    finally:
        call.cancel()


def _seconds(name: str, text: str) -> float:
    try:
        milliseconds = float(text)
    except ValueError:
        milliseconds = math.nan
    if not 0 < milliseconds < math.inf:
        raise invalid(name, f"expected milliseconds above 0, got {text!r}")
    return milliseconds / 1000
