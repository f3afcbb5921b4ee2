"""Bearer tokens over a real channel: who is let in, and what the others are told."""

import time
from collections.abc import Iterator
from pathlib import Path

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc
from live import LiveServer
from secured import Secured, Stream, generation, refusal, secured
from statuses import Failure

from patchclamp.v1 import model_pb2, model_pb2_grpc
from patchclamp.v1.generation_pb2_grpc import GenerationServiceStub
from patchclamp_server.security.tokens import new_token

UNAUTHENTICATED = grpc.StatusCode.UNAUTHENTICATED


@pytest.fixture(scope="module")
def server(live_server: LiveServer, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Secured]:
    with secured(live_server.model, tmp_path_factory.mktemp("tokens"), "research", "product") as server:
        yield server


@pytest.fixture
def calls(server: Secured) -> Iterator[grpc.Channel]:
    with grpc.insecure_channel(server.server.address) as channel:
        yield channel


def refused(channel: grpc.Channel, *metadata: tuple[str, str]) -> Failure:
    models = model_pb2_grpc.ModelServiceStub(channel)
    return refusal(lambda: models.ListModels(model_pb2.ListModelsRequest(), metadata=metadata))


def test_a_token_opens_every_shape_of_call(server: Secured, calls: grpc.Channel):
    assert server.generate(calls, "research", generation())[-1].HasField("finished")
    stream = Stream(calls, server.metadata("research"))
    assert len(stream.tokens(3)) == 3
    stream.end()
    models = model_pb2_grpc.ModelServiceStub(calls)
    assert models.ListModels(model_pb2.ListModelsRequest(), metadata=server.metadata("product")).models


@pytest.mark.parametrize(
    ("metadata", "reason"),
    [
        ((), "TOKEN_MISSING"),
        ((("authorization", "Bearer patchclamp_wrong"),), "TOKEN_UNKNOWN"),
        ((("authorization", "Bearer"),), "TOKEN_MALFORMED"),
        ((("authorization", "Basic cGF0Y2g6Y2xhbXA="),), "TOKEN_MALFORMED"),
        ((("authorization", "Bearer a"), ("authorization", "Bearer b")), "TOKEN_MALFORMED"),
    ],
)
def test_without_a_good_token_the_call_is_refused_with_its_reason(
    server: Secured, calls: grpc.Channel, metadata: tuple[tuple[str, str], ...], reason: str
):
    sample = f'patchclamp_auth_failures_total{{reason="{reason}"}}'
    before = server.server.metric(sample)
    answer = refused(calls, *metadata)
    assert (answer.code, answer.reason) == (UNAUTHENTICATED, reason)
    assert server.server.metric(sample) == before + 1


def test_a_stream_without_a_token_is_refused_before_its_first_message_is_read(calls: grpc.Channel):
    answer = refusal(lambda: next(GenerationServiceStub(calls).Session(iter(()))))
    assert (answer.code, answer.reason) == (UNAUTHENTICATED, "TOKEN_MISSING")


def test_probes_need_no_token_and_reflection_does(server: Secured, calls: grpc.Channel):
    health = health_pb2_grpc.HealthStub(calls).Check(health_pb2.HealthCheckRequest())
    assert health.status == health_pb2.HealthCheckResponse.SERVING
    reflection = reflection_pb2_grpc.ServerReflectionStub(calls)
    asked = [reflection_pb2.ServerReflectionRequest(list_services="")]
    assert refusal(lambda: list(reflection.ServerReflectionInfo(iter(asked)))).code is UNAUTHENTICATED
    [services] = reflection.ServerReflectionInfo(iter(asked), metadata=server.metadata("research"))
    assert services.list_services_response.service


def test_an_expired_token_is_refused_as_such(live_server: LiveServer, tmp_path: Path):
    with secured(live_server.model, tmp_path, "research") as server:
        presented, kept = new_token("research", time.time() - 1)
        server.write_tokens(kept.line)
        with grpc.insecure_channel(server.server.address) as channel:
            answer = refused(channel, ("authorization", f"Bearer {presented}"))
    assert (answer.code, answer.reason) == (UNAUTHENTICATED, "TOKEN_EXPIRED")


def test_the_file_is_read_again_while_a_stream_runs(live_server: LiveServer, tmp_path: Path):
    with (
        secured(live_server.model, tmp_path, "research") as server,
        grpc.insecure_channel(server.server.address) as channel,
    ):
        stream = Stream(channel, server.metadata("research"))
        stream.tokens(2)
        presented, kept = new_token("product")
        server.write_tokens(kept.line)
        # The stream goes on; its token opens no other.
        assert len(stream.tokens(2)) == 2
        assert server.refused(channel, "research", generation()).reason == "TOKEN_UNKNOWN"
        server.tokens["product"] = presented
        assert server.generate(channel, "product", generation())
        stream.end()


def test_a_broken_file_keeps_the_tokens_that_were_good(live_server: LiveServer, tmp_path: Path):
    with (
        secured(live_server.model, tmp_path, "research") as server,
        grpc.insecure_channel(server.server.address) as channel,
    ):
        server.write_tokens("research sha256:short", outcome="failed")
        assert server.generate(channel, "research", generation())
