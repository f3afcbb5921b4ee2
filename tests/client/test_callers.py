"""One channel for several callers, and clients of both kinds that are made, used and closed as it comes."""

import asyncio
from collections.abc import Callable
from contextlib import aclosing
from typing import Any

import grpc
import pytest
from live import LiveServer

from patchclamp import AsyncClient, Client
from patchclamp.v1 import generation_pb2, model_pb2
from patchclamp.v1.generation_pb2_grpc import GenerationServiceServicer
from patchclamp.v1.model_pb2_grpc import ModelServiceServicer

Serve = Callable[..., str]


class Callers(ModelServiceServicer, GenerationServiceServicer):
    """Remembers the token and the connection of each call; a stream waits after its first message."""

    def __init__(self) -> None:
        self.tokens: list[str | None] = []
        self.peers: set[str] = set()

    def ListModels(self, request: Any, context: grpc.ServicerContext) -> model_pb2.ListModelsResponse:
        self._remember(context)
        return model_pb2.ListModelsResponse(models=[model_pb2.Model(name="tiny")])

    def Generate(self, request: Any, context: grpc.ServicerContext) -> Any:
        self._remember(context)
        yield generation_pb2.GenerateResponse(text="hello")
        yield generation_pb2.GenerateResponse(finished=generation_pb2.Finished())

    def Session(self, request_iterator: Any, context: Any) -> Any:
        raise NotImplementedError

    Score = Compare = Tokenize = Session

    def _remember(self, context: grpc.ServicerContext) -> None:
        self.tokens.append(dict(context.invocation_metadata()).get("authorization"))
        self.peers.add(context.peer())


def test_callers_share_a_channel_and_not_their_tokens(serve: Serve):
    server = Callers()
    with Client(serve(models=server, generation=server), token="one") as client:
        client.models()
        with client.with_token("two") as other:
            other.models()
            other.generate("hi").result()
        client.with_token(None).models()
        # Closing the other has left the channel open.
        client.models()
    assert server.tokens == ["Bearer one", "Bearer two", "Bearer two", None, "Bearer one"]
    assert len(server.peers) == 1


async def test_async_callers_share_a_channel_too(serve: Serve):
    server = Callers()
    async with AsyncClient(serve(models=server, generation=server), token="one") as client:
        async with client.with_token("two") as other:
            await other.models()
            await other.generate("hi").result()
        await client.models()
    assert server.tokens == ["Bearer two", "Bearer two", "Bearer one"]
    assert len(server.peers) == 1


@pytest.mark.parametrize("client", [Client, AsyncClient])
def test_another_token_does_not_go_out_in_clear_either(client: type[Client] | type[AsyncClient]):
    with pytest.raises(ValueError, match="the token is not sent to"):
        client("example.org:1").with_token("t")


def test_the_async_client_may_be_made_before_a_loop_runs_and_outlive_it(serve: Serve):
    client = AsyncClient(serve(models=Callers()))

    async def models() -> Any:
        return await client.models()

    assert asyncio.run(models())
    assert asyncio.run(models())
    asyncio.run(client.close())
    with pytest.raises(ValueError, match="closed"):
        asyncio.run(models())


async def test_a_stream_of_the_async_client_is_closed_with_or_without_await(serve: Serve):
    server = Callers()
    async with AsyncClient(serve(generation=server)) as client:
        for close in ("close", "aclose"):
            stream = client.generate("hi")
            await anext(stream)
            await getattr(stream, close)()
            assert [chunk async for chunk in stream] == []
        async with aclosing(client.generate("hi")) as stream:
            await anext(stream)
        assert [chunk async for chunk in stream] == []
        stream = client.generate("hi")
        stream.close()
        assert [chunk async for chunk in stream] == []
        await client.aclose()


async def test_a_session_leaves_no_task_behind(live_server: LiveServer):
    async with AsyncClient(live_server.address) as client:
        for _ in range(3):
            async with client.session("hello", max_tokens=2, ignore_eos=True) as session:
                await session.result()
        # What ends with a call ends when the loop comes to it.
        for _ in range(1000):
            await asyncio.sleep(0)
        assert asyncio.all_tasks() == {asyncio.current_task()}
