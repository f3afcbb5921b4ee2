"""Calls that a full server refuses: sent again when the client was told to, not before the time and not for ever."""

import time
from collections.abc import Callable, Iterator
from typing import Any

import grpc
import pytest
from google.protobuf import any_pb2, duration_pb2
from google.rpc import error_details_pb2, status_pb2
from grpc_status import rpc_status

from patchclamp import AsyncClient, Client, PatchclampError, Retry
from patchclamp.retry import Attempts
from patchclamp.v1 import generation_pb2, model_pb2
from patchclamp.v1.generation_pb2_grpc import GenerationServiceServicer
from patchclamp.v1.model_pb2_grpc import ModelServiceServicer, ModelServiceStub

Serve = Callable[..., str]
ASAP = Retry(jitter=0.0)


class Full(ModelServiceServicer, GenerationServiceServicer):
    """Refuses `refusals` calls, with a time to retry after unless it is None."""

    def __init__(self, refusals: int, retry_after: float | None = 0.01) -> None:
        self.refusals = refusals
        self.retry_after = retry_after
        self.times: list[float] = []

    def ListModels(self, request: Any, context: grpc.ServicerContext) -> model_pb2.ListModelsResponse:
        self._refuse_or_count(context)
        return model_pb2.ListModelsResponse(models=[model_pb2.Model(name="tiny")])

    def Generate(self, request: Any, context: grpc.ServicerContext) -> Iterator[generation_pb2.GenerateResponse]:
        self._refuse_or_count(context)
        yield generation_pb2.GenerateResponse(text="hello")
        yield generation_pb2.GenerateResponse(finished=generation_pb2.Finished())

    def Session(self, request_iterator: Any, context: Any) -> Iterator[generation_pb2.GenerateResponse]:
        self._refuse_or_count(context)
        for message in request_iterator:
            if message.HasField("stop"):
                yield generation_pb2.GenerateResponse(finished=generation_pb2.Finished())
                return
            yield generation_pb2.GenerateResponse(text=message.WhichOneof("event"))

    Score = Compare = Tokenize = ListModels

    def _refuse_or_count(self, context: grpc.ServicerContext) -> None:
        self.times.append(time.monotonic())
        if len(self.times) <= self.refusals:
            context.abort_with_status(rpc_status.to_status(refusal(self.retry_after)))


class Breaks(GenerationServiceServicer):
    """Every session ends after its first message."""

    def __init__(self) -> None:
        self.calls = 0

    def Session(self, request_iterator: Any, context: grpc.ServicerContext) -> Any:
        self.calls += 1
        yield generation_pb2.GenerateResponse(text="hello")
        context.abort(grpc.StatusCode.UNAVAILABLE, "gone")

    Generate = Score = Compare = Session


def refusal(retry_after: float | None) -> status_pb2.Status:
    status = status_pb2.Status(code=grpc.StatusCode.RESOURCE_EXHAUSTED.value[0], message="full")
    if retry_after is not None:
        delay = duration_pb2.Duration()
        delay.FromNanoseconds(int(retry_after * 1e9))
        packed = any_pb2.Any()
        packed.Pack(error_details_pb2.RetryInfo(retry_delay=delay))
        status.details.append(packed)
    return status


def test_a_refused_call_is_sent_again_after_the_time_it_was_given(serve: Serve) -> None:
    server = Full(refusals=2, retry_after=0.05)
    with Client(serve(models=server), retry=ASAP) as client:
        assert [model.name for model in client.models()] == ["tiny"]
    assert all(later - earlier >= 0.05 for earlier, later in zip(server.times, server.times[1:], strict=False))


def test_a_refused_stream_is_sent_again(serve: Serve) -> None:
    server = Full(refusals=2)
    with Client(serve(generation=server), retry=ASAP) as client:
        assert client.generate("hi").result().text == "hello"
    assert len(server.times) == 3


async def test_the_async_client_sends_again_too(serve: Serve) -> None:
    server = Full(refusals=2)
    async with AsyncClient(serve(generation=server, models=server), retry=ASAP) as client:
        assert (await client.generate("hi").result()).text == "hello"
        assert [model.name for model in await client.models()] == ["tiny"]
    assert len(server.times) == 4


def test_without_a_policy_the_error_says_when(serve: Serve) -> None:
    server = Full(refusals=1, retry_after=2.5)
    with Client(serve(models=server)) as client, pytest.raises(PatchclampError) as refused:
        client.models()
    assert (refused.value.retry_after, len(server.times)) == (2.5, 1)


@pytest.mark.parametrize(("retry_after", "timeout"), [(None, 30.0), (100.0, 30.0), (20.0, 10.0)])
def test_nothing_is_sent_again_without_a_time_or_beyond_the_end(
    serve: Serve, retry_after: float | None, timeout: float
) -> None:
    server = Full(refusals=1, retry_after=retry_after)
    client = Client(serve(models=server), retry=Retry(seconds=60.0), timeout=timeout)
    with client, pytest.raises(PatchclampError, match="RESOURCE_EXHAUSTED"):
        client.models()
    assert len(server.times) == 1


def test_the_timeout_holds_for_all_attempts_together() -> None:
    attempts = Attempts(Retry(), 30.0)
    first, second = attempts.seconds_left(), attempts.seconds_left()
    assert first is not None
    assert second is not None
    assert second < first <= 30.0
    assert Attempts(Retry(), None).seconds_left() is None


def test_a_refused_session_is_sent_again_with_all_that_it_has_sent(serve: Serve) -> None:
    server = Full(refusals=2)
    with Client(serve(generation=server), retry=ASAP) as client, client.session("hi", lockstep=True) as session:
        session.advance(1)
        session.set_strength("joy", 1.0)
        assert [next(session).text for _ in range(3)] == ["start", "advance", "set_strength"]
        session.advance(1)
        assert next(session).text == "advance"
        session.stop()
        assert next(session).finished
    assert len(server.times) == 3


async def test_a_refused_session_of_the_async_client_is_too(serve: Serve) -> None:
    server = Full(refusals=2)
    async with (
        AsyncClient(serve(generation=server), retry=ASAP) as client,
        client.session("hi", lockstep=True) as session,
    ):
        await session.advance(1)
        assert [(await anext(session)).text for _ in range(2)] == ["start", "advance"]
        await session.stop()
        assert (await anext(session)).finished
    assert len(server.times) == 3


def test_a_session_that_has_been_answered_is_not_sent_again(serve: Serve) -> None:
    server = Breaks()
    with Client(serve(generation=server), retry=ASAP) as client, client.session("hi") as session:
        assert next(session).text == "hello"
        with pytest.raises(PatchclampError, match="UNAVAILABLE"):
            next(session)
    assert server.calls == 1


def test_closing_a_stream_that_waits_to_be_sent_again_ends_it(serve: Serve) -> None:
    server = Full(refusals=1, retry_after=20.0)
    with Client(serve(generation=server), retry=ASAP) as client:
        stream = client.generate("hi")
        stream.close()
        assert list(stream) == []


def test_jitter_only_adds_to_the_time_and_at_most_its_share(serve: Serve) -> None:
    full = Full(refusals=1, retry_after=2.0)
    with grpc.insecure_channel(serve(models=full)) as channel, pytest.raises(grpc.RpcError) as refused:
        ModelServiceStub(channel).ListModels(model_pb2.ListModelsRequest())
    delays = [Attempts(Retry(jitter=0.5), None).delay(refused.value) for _ in range(200)]
    assert all(delay is not None and 2.0 <= delay <= 3.0 for delay in delays)
    assert len(set(delays)) > 100


def test_who_is_refused_again_and_again_waits_longer_and_longer(serve: Serve) -> None:
    """A place that takes two minutes to become free is asked for about as often as that number has bits."""
    full = Full(refusals=1, retry_after=1.0)
    with grpc.insecure_channel(serve(models=full)) as channel, pytest.raises(grpc.RpcError) as refused:
        ModelServiceStub(channel).ListModels(model_pb2.ListModelsRequest())
    attempts = Attempts(Retry(seconds=120.0, jitter=0.0), None)
    delays = [attempts.delay(refused.value) for _ in range(6)]
    assert delays == [1.0, 2.0, 4.0, 8.0, 16.0, 32.0]


def test_the_wait_does_not_grow_beyond_half_of_what_is_left(serve: Serve) -> None:
    full = Full(refusals=1, retry_after=1.0)
    with grpc.insecure_channel(serve(models=full)) as channel, pytest.raises(grpc.RpcError) as refused:
        ModelServiceStub(channel).ListModels(model_pb2.ListModelsRequest())
    attempts = Attempts(Retry(seconds=120.0, jitter=0.0), 10.0)
    delays = [attempts.delay(refused.value) for _ in range(50)]
    assert delays[:3] == [1.0, 2.0, 4.0]
    assert all(delay is not None and delay <= 5.0 for delay in delays)


@pytest.mark.parametrize("arguments", [{"seconds": -1.0}, {"jitter": -0.1}])
def test_a_policy_of_negative_times_is_refused(arguments: dict[str, float]) -> None:
    with pytest.raises(ValueError, match="at least 0"):
        Retry(**arguments)
