"""What every call passes through: metrics, the count of calls in flight, and errors as statuses.

Handlers that stream are driven here, and their generators closed here, so that a call that is cancelled while it
writes still runs the `finally` of its handler at once.
"""

import asyncio
import logging
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import aclosing, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import grpc

from patchclamp_server.errors import RequestError, Unavailable
from patchclamp_server.metrics import Metrics
from patchclamp_server.rpc.errors import to_status, unexpected_status

logger = logging.getLogger(__name__)

# grpc's own types do not say what an aio handler is; these are its shapes.
Context = Any
Handler = Any


@dataclass(frozen=True)
class Method:
    service: str
    name: str

    @classmethod
    def parse(cls, path: str) -> "Method":
        """ "/patchclamp.v1.ModelService/ListModels" → its two parts."""
        service, _, name = path.removeprefix("/").rpartition("/")
        return cls(service, name)


# Label of a call to a method that does not exist: its name is the client's and so not of a closed set.
UNKNOWN = Method("unknown", "unknown")


class InFlight:
    """Counts calls that are being answered; after `close` no more may begin, and `idle` resolves when none is left."""

    def __init__(self) -> None:
        self._calls = 0
        self._closed = False
        self._idle = asyncio.Event()
        self._idle.set()

    @contextmanager
    def call(self) -> Iterator[None]:
        """One call. Raises Unavailable after `close`."""
        if self._closed:
            raise Unavailable("", "the server is shutting down")
        self._calls += 1
        self._idle.clear()
        try:
            yield
        finally:
            self._calls -= 1
            if self._calls == 0:
                self._idle.set()

    def close(self) -> None:
        self._closed = True

    async def idle(self) -> None:
        await self._idle.wait()


class CallInterceptor(grpc.aio.ServerInterceptor):  # type: ignore[type-arg]
    """`counted`: services whose calls `in_flight` counts: those that a drain refuses and waits for."""

    def __init__(self, metrics: Metrics, in_flight: InFlight, counted: frozenset[str]) -> None:
        self._metrics = metrics
        self._in_flight = in_flight
        self._counted = counted

    async def intercept_service(
        self, continuation: Callable[[Any], Awaitable[Handler]], handler_call_details: Any
    ) -> Handler:
        handler = await continuation(handler_call_details)
        if handler is None:
            self._metrics.requests.labels(UNKNOWN.service, UNKNOWN.name, grpc.StatusCode.UNIMPLEMENTED.name).inc()
            return None
        method = Method.parse(handler_call_details.method)
        if handler.response_streaming:
            behaviour = handler.stream_stream if handler.request_streaming else handler.unary_stream

            async def stream(request: Any, context: Context) -> None:
                await self._answer(method, context, lambda: _write_all(behaviour, request, context))

            make = (
                grpc.stream_stream_rpc_method_handler
                if handler.request_streaming
                else grpc.unary_stream_rpc_method_handler
            )
            return make(stream, handler.request_deserializer, handler.response_serializer)
        behaviour = handler.stream_unary if handler.request_streaming else handler.unary_unary

        async def unary(request: Any, context: Context) -> Any:
            return await self._answer(method, context, lambda: behaviour(request, context))

        make = (
            grpc.stream_unary_rpc_method_handler if handler.request_streaming else grpc.unary_unary_rpc_method_handler
        )
        return make(unary, handler.request_deserializer, handler.response_serializer)

    async def _answer(self, method: Method, context: Context, answer: Callable[[], Awaitable[Any]]) -> Any:
        with self._measured(method) as outcome:
            try:
                with self._in_flight.call() if method.service in self._counted else nullcontext():
                    result = await answer()
            except RequestError as error:
                status = to_status(error)
                if status.code is grpc.StatusCode.INTERNAL:
                    logger.error("%s/%s failed: %s", method.service, method.name, error)
            except asyncio.CancelledError:
                expired = context.time_remaining() is not None and context.time_remaining() <= 0
                outcome.code = grpc.StatusCode.DEADLINE_EXCEEDED if expired else grpc.StatusCode.CANCELLED
                raise
            except grpc.aio.AbortError:
                outcome.code = context.code()
                raise
            except Exception:
                logger.exception("%s/%s failed", method.service, method.name)
                status = unexpected_status()
            else:
                outcome.code = _code_set_by_handler(context)
                return result
            outcome.code = status.code
        # The count is complete before the client can know the status.
        return await context.abort(status.code, status.details, status.trailing_metadata)

    @contextmanager
    def _measured(self, method: Method) -> Iterator["_Outcome"]:
        outcome = _Outcome()
        labels = (method.service, method.name)
        started = time.monotonic()
        self._metrics.in_flight.labels(*labels).inc()
        try:
            yield outcome
        finally:
            self._metrics.in_flight.labels(*labels).dec()
            self._metrics.request_seconds.labels(*labels).observe(time.monotonic() - started)
            self._metrics.requests.labels(*labels, outcome.code.name).inc()


@dataclass
class _Outcome:
    code: grpc.StatusCode = grpc.StatusCode.UNKNOWN


async def _write_all(behaviour: Any, request: Any, context: Context) -> None:
    """Run a streaming handler, of either kind that grpc.aio has: a generator, or a coroutine that writes itself."""
    produced = behaviour(request, context)
    if not isinstance(produced, AsyncIterator):
        await produced
        return
    async with aclosing(produced) as responses:  # type: ignore[type-var]
        async for response in responses:
            await context.write(response)


def _code_set_by_handler(context: Context) -> grpc.StatusCode:
    """OK unless the handler called set_code; grpc.aio gives what was set, a StatusCode or its number."""
    code = context.code()
    if isinstance(code, grpc.StatusCode):
        return code
    return next(c for c in grpc.StatusCode if c.value[0] == (code or 0))
