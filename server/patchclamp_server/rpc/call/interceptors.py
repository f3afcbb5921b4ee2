"""Every call passes through this: metrics, the count of calls in flight, and errors as statuses.

Handlers that stream are driven here, and their generators closed here, so that a call that is cancelled while it writes
still runs the `finally` of its handler at once.
"""

import asyncio
import logging
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import AbstractAsyncContextManager, aclosing, contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import grpc
from google.protobuf.message import DecodeError

from patchclamp_server.engine.faults import fault_of
from patchclamp_server.errors import InvalidArgument, RequestError, ResourceExhausted, Unavailable
from patchclamp_server.rpc.call.errors import to_status
from patchclamp_server.rpc.call.security import CallSecurity, Received, unchanged
from patchclamp_server.rpc.config import DEFAULT_MAX_CALLS
from patchclamp_server.rpc.metrics.server import Metrics
from patchclamp_server.security.running_call import RunningCall

logger = logging.getLogger(__name__)

# grpc's own types do not say what an aio handler is; these stand for its shapes.
Context = Any
Handler = Any

# A client resets its call at its deadline, and gRPC rounds up what it tells the server: less than this is left then.
LAST_MOMENT_SECONDS = 0.1


@dataclass(frozen=True)
class Method:
    service: str
    name: str

    @classmethod
    def parse(cls, path: str) -> "Method":
        """Splits "/patchclamp.v1.ModelService/ListModels" into its two parts."""
        service, _, name = path.removeprefix("/").rpartition("/")
        return cls(service, name)


# This labels a call to a method that does not exist, because a name from the client is not of a closed set.
UNKNOWN = Method("unknown", "unknown")


class InFlight:
    """Counts calls that are being answered. After `close` no more may begin, `idle` resolves when none is left, and
    `end` ends those that are left.

    At most `max_calls` run at once: streams of every kind, sessions, uploads and jobs that wait for their turn.
    """

    def __init__(self, max_calls: int = DEFAULT_MAX_CALLS) -> None:
        self._max_calls = max_calls
        self._running: set[RunningCall] = set()
        self._closed = False
        self._idle = asyncio.Event()
        self._idle.set()

    @contextmanager
    def call(self) -> Iterator[None]:
        """Counts one call. Raises Unavailable after `close`, ResourceExhausted when there are `max_calls`."""
        if self._closed:
            raise Unavailable("", "the server is shutting down")
        if len(self._running) >= self._max_calls:
            raise ResourceExhausted("", f"{len(self._running)} calls are being answered, as many as may")
        running = RunningCall()
        self._running.add(running)
        self._idle.clear()
        try:
            with running.ending_with(Unavailable("", "the server has shut down before the call was finished")):
                yield
        finally:
            self._running.remove(running)
            if not self._running:
                self._idle.set()

    def close(self) -> None:
        self._closed = True

    def end(self) -> None:
        """Ends the calls with UNAVAILABLE."""
        for call in self._running:
            call.kill()

    async def idle(self) -> None:
        await self._idle.wait()


class CallInterceptor(grpc.aio.ServerInterceptor):  # type: ignore[type-arg]
    """`counted` names the services whose calls `in_flight` counts: those that a drain refuses and waits for."""

    def __init__(
        self, metrics: Metrics, in_flight: InFlight, counted: frozenset[str], security: CallSecurity | None = None
    ) -> None:
        self._metrics = metrics
        self._security = security
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
        decoded = _decoding(handler)
        if handler.response_streaming:
            behaviour = handler.stream_stream if handler.request_streaming else handler.unary_stream

            async def stream(request: Any, context: Context) -> None:
                await self._answer(
                    method, context, lambda received: write_all(behaviour, received(decoded(request)), context)
                )

            make = (
                grpc.stream_stream_rpc_method_handler
                if handler.request_streaming
                else grpc.unary_stream_rpc_method_handler
            )
            return make(stream, None, handler.response_serializer)
        behaviour = handler.stream_unary if handler.request_streaming else handler.unary_unary

        async def unary(request: Any, context: Context) -> Any:
            return await self._answer(method, context, lambda received: behaviour(received(decoded(request)), context))

        make = (
            grpc.stream_unary_rpc_method_handler if handler.request_streaming else grpc.unary_unary_rpc_method_handler
        )
        return make(unary, None, handler.response_serializer)

    async def answer_detached(self, method: Method, behaviour: Any, request: Any, context: Context) -> None:
        """Answers a call without a client, of a method that streams; it passes through all that others do."""
        await self._answer(method, context, lambda received: write_all(behaviour, received(request), context))

    async def _answer(self, method: Method, context: Context, answer: Callable[[Received], Awaitable[Any]]) -> Any:
        with self._measured(method) as outcome:
            try:
                with self._in_flight.call() if method.service in self._counted else nullcontext():
                    async with self._secured(method, context, outcome) as received:
                        result = await answer(received)
            except RequestError as error:
                status = to_status(error)
                if status.code is grpc.StatusCode.INTERNAL:
                    logger.error("%s/%s failed: %s", method.service, method.name, error)
            except asyncio.CancelledError:
                outcome.code = code_of_cancelled(context)
                raise
            except grpc.aio.AbortError:
                outcome.code = context.code()
                raise
            except Exception as error:
                logger.exception("%s/%s failed", method.service, method.name)
                status = to_status(fault_of(error))
            else:
                outcome.code = code_set_by_handler(context)
                return result
            outcome.code = status.code
        # The count is complete before the client can know the status.
        try:
            return await context.abort(status.code, status.details, status.trailing_metadata)
        except grpc.aio.InternalError as error:
            raise asyncio.CancelledError from error  # see write_all

    def _secured(self, method: Method, context: Context, outcome: "_Outcome") -> AbstractAsyncContextManager[Received]:
        if self._security is None:
            return nullcontext(unchanged)
        return self._security.call(method.service, method.name, context, outcome)

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
            outcome.end()


@dataclass
class _Outcome:
    code: grpc.StatusCode = grpc.StatusCode.UNKNOWN
    _callbacks: list[Callable[[str], None]] = field(default_factory=list)

    def then(self, callback: Callable[[str], None]) -> None:
        """Calls back with the name of the code when the call has one."""
        self._callbacks.append(callback)

    def end(self) -> None:
        for callback in self._callbacks:
            callback(self.code.name)


def _decoding(handler: Handler) -> Callable[[Any], Any]:
    """Returns what decodes the bytes that arrived to a message, or an iterator of them to messages.

    If gRPC did this, bytes that are not a message would be answered as a fault of the server.
    """

    parse = handler.request_deserializer or bytes

    def message(data: bytes) -> Any:
        try:
            return parse(data)
        except DecodeError as error:
            raise InvalidArgument("", f"expected a message of the type of this method: {error}") from error

    async def messages(received: AsyncIterator[bytes]) -> AsyncIterator[Any]:
        async for data in received:
            yield message(data)

    return messages if handler.request_streaming else message


async def write_all(behaviour: Any, request: Any, context: Context) -> None:
    """Runs a streaming handler, of either kind that grpc.aio has: a generator, or a coroutine that writes itself."""
    produced = behaviour(request, context)
    if not isinstance(produced, AsyncIterator):
        await produced
        return
    async with aclosing(produced) as responses:  # type: ignore[type-var]
        async for response in responses:
            try:
                await context.write(response)
            except grpc.aio.InternalError as error:
                # The call has ended, by its client or its deadline, before this could be sent; gRPC's own cancellation
                # comes after.
                raise asyncio.CancelledError from error


def code_of_cancelled(context: Context) -> grpc.StatusCode:
    """Returns the code of a call that gRPC has cancelled: its deadline has passed, or else the client has left."""
    remaining = context.time_remaining()
    expired = remaining is not None and remaining <= LAST_MOMENT_SECONDS
    return grpc.StatusCode.DEADLINE_EXCEEDED if expired else grpc.StatusCode.CANCELLED


def code_set_by_handler(context: Context) -> grpc.StatusCode:
    """Returns OK unless the handler called set_code; grpc.aio gives what was set, a StatusCode or its number."""
    code = context.code()
    if isinstance(code, grpc.StatusCode):
        return code
    return next(c for c in grpc.StatusCode if c.value[0] == (code or 0))
