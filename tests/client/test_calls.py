"""Calls of both clients against a small real server: retries, deadlines, cancellation, credentials, sessions."""

import asyncio
import math
from collections.abc import Callable, Iterator
from threading import Event
from typing import Any

import grpc
import numpy as np
import pytest
from patience import PATIENCE_SECONDS

from patchclamp import AsyncClient, Client, PatchclampError
from patchclamp.requests import prompt
from patchclamp.v1 import generation_pb2, model_pb2
from patchclamp.v1.generation_pb2_grpc import GenerationServiceServicer
from patchclamp.v1.model_pb2_grpc import ModelServiceServicer

Serve = Callable[..., str]


class Flaky(ModelServiceServicer, GenerationServiceServicer):
    """Fails `failures` calls with `code`, before the first message of a stream, then answers."""

    def __init__(self, failures: int, code: grpc.StatusCode = grpc.StatusCode.UNAVAILABLE) -> None:
        self.failures = failures
        self.code = code
        self.calls = 0
        self.metadata: dict[str, Any] = {}

    def ListModels(self, request: Any, context: grpc.ServicerContext) -> model_pb2.ListModelsResponse:
        self._fail_or_count(context)
        return model_pb2.ListModelsResponse(models=[model_pb2.Model(name="tiny")])

    def Tokenize(self, request: Any, context: grpc.ServicerContext) -> Any:
        raise NotImplementedError

    def Generate(self, request: Any, context: grpc.ServicerContext) -> Iterator[generation_pb2.GenerateResponse]:
        self._fail_or_count(context)
        yield from answer("hel", "lo")

    def Session(self, request_iterator: Any, context: Any) -> Any:
        raise NotImplementedError

    Score = Compare = Tokenize

    def _fail_or_count(self, context: grpc.ServicerContext) -> None:
        self.calls += 1
        self.metadata = dict(context.invocation_metadata())
        if self.calls <= self.failures:
            context.abort(self.code, "try another time")


class Streaming(Flaky):
    """Sends one message, then waits for the end of the call, or fails."""

    def __init__(self, then: str) -> None:
        super().__init__(0)
        self.then = then
        self.ended = Event()

    def Generate(self, request: Any, context: grpc.ServicerContext) -> Iterator[generation_pb2.GenerateResponse]:
        self.calls += 1
        context.add_callback(self.ended.set)
        yield generation_pb2.GenerateResponse(text="hel")
        if self.then == "wait":
            self.ended.wait()
        elif self.then == "fail":
            context.abort(grpc.StatusCode.UNAVAILABLE, "gone")

    def Session(self, request_iterator: Any, context: Any) -> Iterator[generation_pb2.GenerateResponse]:
        """Echoes the kind of every message until `stop`."""
        for request in request_iterator:
            kind = request.WhichOneof("event")
            if kind == "stop":
                yield from answer("stop")
                return
            yield generation_pb2.GenerateResponse(text=f"{kind} ")


def answer(*pieces: str) -> list[generation_pb2.GenerateResponse]:
    finished = generation_pb2.Finished(reason=generation_pb2.FINISH_REASON_EOS, seed=7)
    return [
        *(generation_pb2.GenerateResponse(text=piece) for piece in pieces),
        generation_pb2.GenerateResponse(finished=finished),
    ]


def test_a_call_that_is_unavailable_is_repeated(serve: Serve) -> None:
    server = Flaky(failures=2)
    with Client(serve(models=server)) as client:
        assert client.models()[0].name == "tiny"
    assert server.calls == 3


async def test_the_async_client_repeats_it_as_well(serve: Serve) -> None:
    server = Flaky(failures=2)
    async with AsyncClient(serve(models=server)) as client:
        assert (await client.models())[0].name == "tiny"
    assert server.calls == 3


def test_a_stream_is_repeated_before_its_first_message(serve: Serve) -> None:
    server = Flaky(failures=2)
    with Client(serve(generation=server)) as client:
        assert client.generate("hi").result().text == "hello"
    assert server.calls == 3


async def test_an_async_stream_is_repeated_before_its_first_message(serve: Serve) -> None:
    server = Flaky(failures=1)
    async with AsyncClient(serve(generation=server)) as client:
        assert (await client.generate("hi").result()).text == "hello"
    assert server.calls == 2


def test_a_stream_is_not_repeated_after_its_first_message(serve: Serve) -> None:
    server = Streaming(then="fail")
    with Client(serve(generation=server)) as client:
        pieces = client.generate("hi").text
        assert next(pieces) == "hel"
        with pytest.raises(PatchclampError, match="UNAVAILABLE: gone"):
            next(pieces)
    assert server.calls == 1


@pytest.mark.parametrize(
    "code",
    [grpc.StatusCode.RESOURCE_EXHAUSTED, grpc.StatusCode.INTERNAL, grpc.StatusCode.ABORTED, grpc.StatusCode.UNKNOWN],
)
def test_no_other_status_is_repeated(serve: Serve, code: grpc.StatusCode) -> None:
    server = Flaky(failures=1, code=code)
    with Client(serve(models=server)) as client, pytest.raises(PatchclampError) as refused:
        client.models()
    assert (refused.value.code, server.calls) == (code.name, 1)


def test_the_timeout_of_a_call_wins_over_the_default_of_the_client(serve: Serve) -> None:
    server = Streaming(then="wait")
    with (
        Client(serve(generation=server), timeout=math.inf) as client,
        pytest.raises(PatchclampError, match="DEADLINE_EXCEEDED"),
    ):
        client.generate("hi", timeout=0.2).result()
    assert server.ended.wait(PATIENCE_SECONDS)


async def test_a_deadline_ends_an_async_stream(serve: Serve) -> None:
    async with AsyncClient(serve(generation=Streaming(then="wait")), timeout=0.2) as client:
        with pytest.raises(PatchclampError, match="DEADLINE_EXCEEDED"):
            await client.generate("hi").result()


def test_closing_a_stream_cancels_the_call_and_ends_iteration(serve: Serve) -> None:
    server = Streaming(then="wait")
    with Client(serve(generation=server)) as client:
        with client.generate("hi") as stream:
            assert next(stream).text == "hel"
        assert list(stream) == []
        assert server.ended.wait(PATIENCE_SECONDS)


async def test_closing_an_async_stream_cancels_the_call_and_ends_iteration(serve: Serve) -> None:
    server = Streaming(then="wait")
    async with AsyncClient(serve(generation=server)) as client:
        async with client.generate("hi") as stream:
            assert (await anext(stream)).text == "hel"
        assert [chunk async for chunk in stream] == []
        assert await asyncio.to_thread(server.ended.wait, 30)


async def test_cancelling_the_task_that_reads_cancels_the_call(serve: Serve) -> None:
    server = Streaming(then="wait")
    async with AsyncClient(serve(generation=server)) as client:
        stream = client.generate("hi")
        reader = asyncio.create_task(stream.result(lambda _: reader.cancel()))
        with pytest.raises(asyncio.CancelledError):
            await reader
        assert await asyncio.to_thread(server.ended.wait, 30)


def test_a_stream_without_its_last_message_has_no_result(serve: Serve) -> None:
    with Client(serve(generation=Streaming(then="end"))) as client, pytest.raises(PatchclampError, match="DATA_LOSS"):
        client.generate("hi").result()


def test_a_token_is_sent_as_bearer_credential(serve: Serve) -> None:
    server = Flaky(failures=0)
    with Client(serve(models=server), token="secret") as client:
        client.models()
    assert server.metadata["authorization"] == "Bearer secret"


def test_a_session_sends_its_messages_in_order(serve: Serve) -> None:
    with (
        Client(serve(generation=Streaming(then="end"))) as client,
        client.session("hi", lockstep=True) as session,
    ):
        session.advance(2)
        session.set_strength("joy", 2.0)
        session.stop()
        assert session.result().text == "start advance set_strength stop"


async def test_an_async_session_sends_its_messages_in_order(serve: Serve) -> None:
    async with (
        AsyncClient(serve(generation=Streaming(then="end"))) as client,
        client.session("hi", lockstep=True) as session,
    ):
        await session.advance(2)
        await session.set_strength("joy", 2.0)
        await session.stop()
        assert (await session.result()).text == "start advance set_strength stop"


@pytest.mark.parametrize("arguments", [(None,), ("hi", [("user", "hi")])])
def test_exactly_one_of_prompt_and_messages_is_given(arguments: tuple[Any, ...]) -> None:
    prompt, *messages = arguments
    options: Any = {"messages": messages[0]} if messages else {}
    with Client() as client, pytest.raises(ValueError, match="either a prompt or messages"):
        client.generate(prompt, **options)


@pytest.mark.parametrize("ids", [[5, 6], (5, 6), np.array([5, 6])])
def test_a_prompt_of_numbers_is_token_ids(ids: Any) -> None:
    assert list(prompt(ids).tokens.ids) == [5, 6]


@pytest.mark.parametrize("turn", [("user", "hi"), {"role": "user", "content": "hi"}])
def test_a_prompt_of_turns_is_a_chat(turn: Any) -> None:
    chat = generation_pb2.ChatMessages(messages=[generation_pb2.ChatMessage(role="user", content="hi")])
    assert prompt([turn]).chat == prompt(None, messages=[turn]).chat == chat
