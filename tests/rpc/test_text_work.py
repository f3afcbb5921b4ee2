"""Calls whose texts take long: they keep no other call waiting, and nothing is rendered once they have ended."""

import threading
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import grpc
import pytest
from live import LiveServer
from patience import PATIENCE_SECONDS
from statuses import failure
from test_generation_service import request
from transformers import PreTrainedTokenizerFast

from patchclamp.v1 import artifact_pb2, artifact_pb2_grpc, model_pb2, model_pb2_grpc
from patchclamp.v1 import generation_pb2 as pb
from patchclamp.v1.generation_pb2_grpc import GenerationServiceStub
from patchclamp_server.model.load import LoadedModel, load_model
from patchclamp_server.text.text_threads import THREADS

CHAT = pb.Prompt(chat={"messages": [{"role": f"r{i}", "content": "x"} for i in range(4)]})


class Slow(PreTrainedTokenizerFast):
    """Each rendering waits until it is let through."""

    def __init__(self, *arguments: Any, **named: Any) -> None:
        super().__init__(*arguments, **named)
        self.begun, self.let_through = threading.Semaphore(0), threading.Semaphore(0)
        self.renderings = 0

    def apply_chat_template(self, conversation: Sequence[Any], **options: Any) -> Any:
        self.renderings += 1
        self.begun.release()
        assert self.let_through.acquire(timeout=PATIENCE_SECONDS)
        return super().apply_chat_template(conversation, **options)


def slow_model(directory: Path) -> tuple[LoadedModel, Slow]:
    model = load_model(str(directory))
    own = model.tokenizer
    slow = Slow(tokenizer_object=own.backend_tokenizer, bos_token=own.bos_token, eos_token=own.eos_token)
    slow.chat_template = own.chat_template
    return replace(model, tokenizer=slow), slow


@pytest.fixture
def slow(tiny_llama_dir: Path, tmp_path: Path) -> Iterator[tuple[LiveServer, Slow]]:
    model, tokenizer = slow_model(tiny_llama_dir)
    with LiveServer(model, tmp_path) as server:
        yield server, tokenizer
        tokenizer.let_through.release(1000)


def begin(channel: grpc.Channel, tokenizer: Slow, **options: Any) -> "grpc.Future[model_pb2.TokenizeResponse]":
    """A call that has begun to render."""
    call = model_pb2_grpc.ModelServiceStub(channel).Tokenize.future(model_pb2.TokenizeRequest(prompt=CHAT), **options)
    assert tokenizer.begun.acquire(timeout=PATIENCE_SECONDS)
    return call


def test_a_call_that_is_cancelled_renders_no_further(slow: tuple[LiveServer, Slow]) -> None:
    server, tokenizer = slow
    with grpc.insecure_channel(server.address) as channel:
        call = begin(channel, tokenizer)
        call.cancel()
        server.run(_no_calls(server))
        tokenizer.let_through.release(1000)
        # The rendering that ran ends; whoever uses the threads next finds them free.
        assert tokenizer_answers(channel)
    assert tokenizer.renderings == 1


def test_a_call_whose_deadline_passes_renders_no_further(slow: tuple[LiveServer, Slow]) -> None:
    server, tokenizer = slow
    with grpc.insecure_channel(server.address) as channel:
        call = begin(channel, tokenizer, timeout=0.5)
        with pytest.raises(grpc.RpcError) as caught:
            call.result()
        assert failure(caught.value).code is grpc.StatusCode.DEADLINE_EXCEEDED
        server.run(_no_calls(server))
        tokenizer.let_through.release(1000)
        assert tokenizer_answers(channel)
    assert tokenizer.renderings == 1


def test_texts_that_take_long_keep_no_other_call_waiting(slow: tuple[LiveServer, Slow]) -> None:
    server, tokenizer = slow
    with grpc.insecure_channel(server.address) as channel:
        calls = [begin(channel, tokenizer) for _ in range(THREADS)]
        models = model_pb2_grpc.ModelServiceStub(channel)
        assert models.ListModels(model_pb2.ListModelsRequest(), timeout=PATIENCE_SECONDS).models
        artifacts = artifact_pb2_grpc.ArtifactServiceStub(channel)
        artifacts.ListArtifacts(artifact_pb2.ListArtifactsRequest(), timeout=PATIENCE_SECONDS)
        for call in calls:
            call.cancel()


def test_after_the_drain_nothing_is_rendered(tiny_llama_dir: Path, tmp_path: Path) -> None:
    model, tokenizer = slow_model(tiny_llama_dir)
    with LiveServer(model, tmp_path, drain_seconds=0.1) as server:
        channel = grpc.insecure_channel(server.address)
        call = begin(channel, tokenizer)
    # The server has ended, as after SIGTERM, and its call with it.
    with pytest.raises(grpc.RpcError):
        call.result()
    tokenizer.let_through.release(1000)
    channel.close()
    server.server.services.prompts.serving._pool.shutdown(wait=True)
    assert tokenizer.renderings == 1


def test_a_text_of_four_megabytes_is_refused_before_it_is_read(live_server: LiveServer) -> None:
    text = "hello " * 650_000
    with grpc.insecure_channel(live_server.address) as channel:
        for call in (
            lambda: list(GenerationServiceStub(channel).Generate(request(prompt=pb.Prompt(text=text)))),
            lambda: GenerationServiceStub(channel).Score(pb.ScoreRequest(prompt=pb.Prompt(text="a"), text=text)),
        ):
            with pytest.raises(grpc.RpcError) as caught:
                call()
            assert failure(caught.value).code is grpc.StatusCode.INVALID_ARGUMENT
            assert "bytes; at most" in failure(caught.value).message


def tokenizer_answers(channel: grpc.Channel) -> bool:
    prompt = pb.Prompt(text="hello")
    stub = model_pb2_grpc.ModelServiceStub(channel)
    return all(
        stub.Tokenize(model_pb2.TokenizeRequest(prompt=prompt), timeout=PATIENCE_SECONDS).ids for _ in range(THREADS)
    )


async def _no_calls(server: LiveServer) -> None:
    await server.server._in_flight.idle()
