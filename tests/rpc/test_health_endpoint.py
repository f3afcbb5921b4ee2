"""Health on an address of its own, for probes that speak no TLS."""

import re
from collections.abc import Iterator
from pathlib import Path

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from live import LiveServer
from statuses import failure

from patchclamp.cli import main
from patchclamp.v1 import model_pb2
from patchclamp.v1.model_pb2_grpc import ModelServiceStub
from patchclamp_server.model.load import load_model
from patchclamp_server.rpc.contract import SERVICES


@pytest.fixture(scope="module")
def server(tiny_llama_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[LiveServer]:
    artifacts = tmp_path_factory.mktemp("health_artifacts")
    with LiveServer(load_model(str(tiny_llama_dir)), artifacts, health_address="127.0.0.1:0") as live:
        yield live


@pytest.fixture
def channel(server: LiveServer) -> Iterator[grpc.Channel]:
    with grpc.insecure_channel(server.server.health_address) as channel:
        yield channel


@pytest.mark.parametrize("service", ["", *SERVICES])
def test_the_health_address_answers_for_every_service(channel: grpc.Channel, service: str):
    answer = health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest(service=service))
    assert answer.status == health_pb2.HealthCheckResponse.SERVING


def test_the_exit_status_of_the_command_line_is_what_a_container_engine_asks_for(server: LiveServer):
    assert main(["health", "--address", server.server.health_address, "--timeout", "4"]) == 0


def test_nothing_but_health_can_be_called_there(channel: grpc.Channel):
    with pytest.raises(grpc.RpcError) as caught:
        ModelServiceStub(channel).ListModels(model_pb2.ListModelsRequest())
    assert failure(caught.value).code is grpc.StatusCode.UNIMPLEMENTED


def test_it_shows_that_the_engine_has_stopped_and_ends_with_the_server(tiny_llama_dir: Path, tmp_path: Path):
    server = LiveServer(load_model(str(tiny_llama_dir)), tmp_path, health_address="127.0.0.1:0")
    with server, grpc.insecure_channel(server.server.health_address) as channel:
        watch = health_pb2_grpc.HealthStub(channel).Watch(health_pb2.HealthCheckRequest())
        assert next(watch).status == health_pb2.HealthCheckResponse.SERVING
        server.server.engine.shutdown()
        assert next(watch).status == health_pb2.HealthCheckResponse.NOT_SERVING
        assert server.metric("patchclamp_serving") == 0
        assert main(["health", "--address", server.server.health_address, "--timeout", "4"]) == 1
    with grpc.insecure_channel(server.server.health_address) as channel, pytest.raises(grpc.RpcError) as caught:
        health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest())
    assert failure(caught.value).code is grpc.StatusCode.UNAVAILABLE


def test_a_health_address_that_is_taken_is_an_error_at_the_start(server: LiveServer, tmp_path: Path):
    second = LiveServer(server.model, tmp_path, health_address=server.server.health_address)
    with pytest.raises(OSError, match=f"--health-address {re.escape(server.server.health_address)}: "):
        second.__enter__()
