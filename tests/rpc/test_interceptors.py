"""Errors, counts and cancellation, for handlers of all four shapes behind a real server."""

import asyncio
import logging
from collections.abc import AsyncIterator

import grpc
import pytest
from statuses import failure

from patchclamp_server.errors import DeadlineExceeded, InvalidArgument
from patchclamp_server.rpc.call.errors import INTERNAL_MESSAGE
from patchclamp_server.rpc.call.interceptors import CallInterceptor, InFlight, Method
from patchclamp_server.rpc.metrics.server import Metrics

SHAPES = ("UnaryUnary", "UnaryStream", "StreamUnary", "StreamStream")
SERVICE = "test.Service"


class Service:
    """Echoes; b"bad" is refused, b"bug" is a defect, b"wait" never ends."""

    def __init__(self) -> None:
        self.closed = asyncio.Event()

    async def unary(self, requests, context) -> bytes:
        return await self._answer(await last(requests))

    async def stream(self, requests, context) -> AsyncIterator[bytes]:
        try:
            request = await last(requests)
            yield b"first"
            yield await self._answer(request)
        finally:
            self.closed.set()

    async def _answer(self, request: bytes) -> bytes:
        match request:
            case b"bad":
                raise InvalidArgument("a.b", "no good")
            case b"bug":
                raise ZeroDivisionError("secret")
            case b"wait":
                await asyncio.Event().wait()
        return request

    def handlers(self) -> dict[str, grpc.RpcMethodHandler]:
        return {
            "UnaryUnary": grpc.unary_unary_rpc_method_handler(self.unary),
            "UnaryStream": grpc.unary_stream_rpc_method_handler(self.stream),
            "StreamUnary": grpc.stream_unary_rpc_method_handler(self.unary),
            "StreamStream": grpc.stream_stream_rpc_method_handler(self.stream),
        }


async def last(requests) -> bytes:
    """The request, or the last one of a stream."""
    if isinstance(requests, bytes):
        return requests
    return [request async for request in requests][-1]


class Harness:
    def __init__(self, service: Service, metrics: Metrics, in_flight: InFlight, channel: grpc.aio.Channel) -> None:
        self.service = service
        self.metrics = metrics
        self.in_flight = in_flight
        self.channel = channel

    def start(self, shape: str, request: bytes):
        path = f"/{SERVICE}/{shape}"
        match shape:
            case "UnaryUnary":
                return self.channel.unary_unary(path)(request)
            case "UnaryStream":
                return self.channel.unary_stream(path)(request)
            case "StreamUnary":
                return self.channel.stream_unary(path)(iter([request]))
            case _:
                return self.channel.stream_stream(path)(iter([request]))

    async def call(self, shape: str, request: bytes) -> list[bytes]:
        started = self.start(shape, request)
        return [r async for r in started] if shape.endswith("Stream") else [await started]

    def count(self, shape: str, code: str) -> float:
        labels = {"service": SERVICE, "method": shape, "code": code}
        return self.metrics.registry.get_sample_value("patchclamp_requests_total", labels) or 0.0


@pytest.fixture
async def harness() -> AsyncIterator[Harness]:
    service, metrics, in_flight = Service(), Metrics(), InFlight()
    server = grpc.aio.server(interceptors=[CallInterceptor(metrics, in_flight, frozenset({SERVICE}))])
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(SERVICE, service.handlers()),))
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    async with grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel:
        yield Harness(service, metrics, in_flight, channel)
    await server.stop(None)


@pytest.mark.parametrize("shape", SHAPES)
async def test_an_answer_passes_through_and_counts(harness: Harness, shape: str):
    answers = await harness.call(shape, b"hello")
    assert answers[-1] == b"hello"
    assert harness.count(shape, "OK") == 1


@pytest.mark.parametrize("shape", SHAPES)
async def test_a_refusal_becomes_its_status_and_counts(harness: Harness, shape: str):
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await harness.call(shape, b"bad")
    assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert caught.value.details() == "a.b: no good"
    assert harness.count(shape, "INVALID_ARGUMENT") == 1


@pytest.mark.parametrize("shape", SHAPES)
async def test_a_defect_is_logged_with_its_traceback_and_stays_inside(
    harness: Harness, shape: str, caplog: pytest.LogCaptureFixture
):
    with caplog.at_level(logging.ERROR), pytest.raises(grpc.aio.AioRpcError) as caught:
        await harness.call(shape, b"bug")
    assert (caught.value.code(), caught.value.details()) == (grpc.StatusCode.INTERNAL, INTERNAL_MESSAGE)
    assert "secret" not in str(caught.value.trailing_metadata())
    assert "ZeroDivisionError: secret" in caplog.text
    assert harness.count(shape, "INTERNAL") == 1


async def test_a_cancelled_stream_runs_the_end_of_its_handler(harness: Harness):
    call = harness.start("UnaryStream", b"wait")
    assert await call.read() == b"first"
    call.cancel()
    await harness.service.closed.wait()
    await harness.in_flight.idle()
    assert harness.count("UnaryStream", "CANCELLED") == 1


async def test_a_passed_deadline_counts_as_such(harness: Harness):
    # Long enough for the call to arrive on a loaded machine.
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await harness.channel.unary_unary(f"/{SERVICE}/UnaryUnary")(b"wait", timeout=0.5)
    assert caught.value.code() is grpc.StatusCode.DEADLINE_EXCEEDED
    await harness.in_flight.idle()
    assert harness.count("UnaryUnary", "DEADLINE_EXCEEDED") == 1


async def test_a_closed_server_refuses_with_a_status_that_may_be_retried(harness: Harness):
    harness.in_flight.close()
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await harness.call("UnaryUnary", b"hello")
    refused = failure(caught.value)
    assert (refused.code, refused.reason) == (grpc.StatusCode.UNAVAILABLE, "DRAINING")


async def test_a_status_that_comes_after_the_end_of_the_call_is_a_cancellation():
    """As where the engine sees a deadline just after gRPC has: who watches the call must not take it for a defect."""

    class Context:
        async def abort(self, *status: object) -> None:
            raise grpc.aio.InternalError('Failed "execute_batch"')

    async def late(received: object) -> None:
        raise DeadlineExceeded("", "the deadline passed")

    metrics = Metrics()
    interceptor = CallInterceptor(metrics, InFlight(), frozenset({SERVICE}))
    with pytest.raises(asyncio.CancelledError):
        await interceptor._answer(Method(SERVICE, "UnaryUnary"), Context(), late)
    labels = {"service": SERVICE, "method": "UnaryUnary", "code": "DEADLINE_EXCEEDED"}
    assert metrics.registry.get_sample_value("patchclamp_requests_total", labels) == 1
