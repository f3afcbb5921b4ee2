"""What clients of a whole server see when something in it fails, or does not come back."""

import logging
import threading
from collections.abc import Iterator
from pathlib import Path

import grpc
import pytest
from faulty_executor import FaultyExecutor, allocate_too_much
from grpc_health.v1 import health_pb2, health_pb2_grpc
from live import LiveServer
from patience import PATIENCE_SECONDS
from statuses import failure
from test_generation_service import request

from patchclamp.v1 import generation_pb2 as pb
from patchclamp.v1 import model_pb2
from patchclamp.v1.generation_pb2_grpc import GenerationServiceStub
from patchclamp.v1.model_pb2_grpc import ModelServiceStub
from patchclamp_server.model.load import load_model

SERVING = health_pb2.HealthCheckResponse.SERVING
NOT_SERVING = health_pb2.HealthCheckResponse.NOT_SERVING
SHORT = request(stop=pb.StopConditions(max_tokens=4, ignore_eos=True))
STEP_TIMEOUT_SECONDS = 0.2


@pytest.fixture
def server(tiny_llama_dir: Path, tmp_path: Path) -> Iterator[LiveServer]:
    model = load_model(str(tiny_llama_dir))
    with LiveServer(model, tmp_path, step_timeout_seconds=STEP_TIMEOUT_SECONDS) as server:
        yield server


@pytest.fixture
def own_channel(server: LiveServer) -> Iterator[grpc.Channel]:
    with grpc.insecure_channel(server.address) as channel:
        yield channel


def inject(server: LiveServer, fault: object) -> None:
    engine = server.server.engine
    engine.runner.executor = FaultyExecutor(engine.executor, fault)  # type: ignore[arg-type]


def test_a_step_that_does_not_end_turns_health_until_it_ends(
    server: LiveServer, own_channel: grpc.Channel, caplog: pytest.LogCaptureFixture
) -> None:
    released = threading.Event()

    def hang_in_the_step(_: int) -> None:
        released.wait(PATIENCE_SECONDS)

    inject(server, hang_in_the_step)
    statuses = health_pb2_grpc.HealthStub(own_channel).Watch(health_pb2.HealthCheckRequest())
    assert next(statuses).status == SERVING
    with caplog.at_level(logging.WARNING):
        stream = GenerationServiceStub(own_channel).Generate(SHORT)
        assert next(statuses).status == NOT_SERVING
        released.set()
        assert next(statuses).status == SERVING
    assert sum(len(response.tokens) for response in stream) == 4
    [late] = [record for record in caplog.records if record.levelno == logging.CRITICAL]
    assert "hang_in_the_step" in late.getMessage()


def test_out_of_memory_in_a_step_says_when_to_come_back(server: LiveServer, own_channel: grpc.Channel) -> None:
    inject(server, lambda step: allocate_too_much() if step == 0 else None)
    stub = GenerationServiceStub(own_channel)
    with pytest.raises(grpc.RpcError) as caught:
        list(stub.Generate(SHORT))
    assert failure(caught.value).code is grpc.StatusCode.RESOURCE_EXHAUSTED
    assert failure(caught.value).details["RetryInfo"].retry_delay.ToNanoseconds() > 0
    assert sum(len(response.tokens) for response in stub.Generate(SHORT)) == 4


def test_out_of_memory_outside_a_step_says_the_same(
    live_server: LiveServer, channel: grpc.Channel, monkeypatch: pytest.MonkeyPatch
) -> None:
    def encode(*_: object) -> None:
        raise MemoryError

    asked = model_pb2.TokenizeRequest(prompt=pb.Prompt(text="a"))
    with monkeypatch.context() as patch:
        patch.setattr(live_server.server.services.prompts, "encode_text", encode)
        with pytest.raises(grpc.RpcError) as caught:
            ModelServiceStub(channel).Tokenize(asked)
    assert failure(caught.value).code is grpc.StatusCode.RESOURCE_EXHAUSTED
    assert "RetryInfo" in failure(caught.value).details
    assert ModelServiceStub(channel).Tokenize(asked).ids


def test_an_engine_that_cannot_go_on_leaves_nobody_waiting(server: LiveServer, own_channel: grpc.Channel) -> None:
    def fault(_: int) -> None:
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    inject(server, fault)
    statuses = health_pb2_grpc.HealthStub(own_channel).Watch(health_pb2.HealthCheckRequest())
    assert next(statuses).status == SERVING
    streams = [GenerationServiceStub(own_channel).Generate(SHORT) for _ in range(4)]
    for stream in streams:
        with pytest.raises(grpc.RpcError) as caught:
            list(stream)
        assert failure(caught.value).code is grpc.StatusCode.UNAVAILABLE
    assert next(statuses).status == NOT_SERVING


@pytest.mark.parametrize("data", [b"\xff\xff\xff", b"\x0a\x05ab", b"\x0a\x02\xff\xfe"], ids=["junk", "short", "UTF-8"])
@pytest.mark.parametrize("method", ["GenerationService/Generate", "ModelService/Tokenize", "ArtifactService/Upload"])
def test_bytes_that_are_no_message_are_the_fault_of_who_sent_them(
    channel: grpc.Channel, method: str, data: bytes
) -> None:
    call = channel.stream_stream(f"/patchclamp.v1.{method}")(iter([data]))
    with pytest.raises(grpc.RpcError) as caught:
        list(call)
    assert failure(caught.value).code is grpc.StatusCode.INVALID_ARGUMENT
