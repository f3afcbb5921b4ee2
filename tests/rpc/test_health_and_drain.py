"""Health and reflection by their standard protocols, and a SIGTERM that loses no running request."""

import os
import queue
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc
from live import LiveServer
from patience import PATIENCE_SECONDS
from secured import until
from statuses import failure
from test_generation_service import request

from patchclamp.v1 import generation_pb2 as pb
from patchclamp.v1.generation_pb2_grpc import GenerationServiceStub
from patchclamp_server.model.load import load_model
from patchclamp_server.rpc.contract import SERVICES

SERVING = health_pb2.HealthCheckResponse.SERVING
NOT_SERVING = health_pb2.HealthCheckResponse.NOT_SERVING
LONG = request(stop=pb.StopConditions(max_tokens=240, ignore_eos=True))


@pytest.mark.parametrize("service", ["", *SERVICES])
def test_every_service_is_serving(channel: grpc.Channel, service: str):
    answer = health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest(service=service))
    assert answer.status == SERVING


def test_an_unknown_service_is_not_found(channel: grpc.Channel):
    with pytest.raises(grpc.RpcError) as caught:
        health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest(service="nothing"))
    assert failure(caught.value).code is grpc.StatusCode.NOT_FOUND


def test_reflection_lists_every_service(channel: grpc.Channel):
    ask = reflection_pb2.ServerReflectionRequest(list_services="")
    [answer] = reflection_pb2_grpc.ServerReflectionStub(channel).ServerReflectionInfo(iter([ask]))
    assert {s.name for s in answer.list_services_response.service} >= {*SERVICES, "grpc.health.v1.Health"}


def test_health_shows_that_the_engine_has_stopped(tiny_llama_dir: Path, tmp_path: Path):
    server = LiveServer(load_model(str(tiny_llama_dir)), tmp_path)
    with server, grpc.insecure_channel(server.address) as channel:
        watch = health_pb2_grpc.HealthStub(channel).Watch(health_pb2.HealthCheckRequest())
        assert next(watch).status == SERVING
        # As after a defect: its thread ends while the server goes on.
        server.server.engine.shutdown()
        assert next(watch).status == NOT_SERVING
        with pytest.raises(grpc.RpcError) as caught:
            list(GenerationServiceStub(channel).Generate(LONG))
        assert failure(caught.value).code is grpc.StatusCode.UNAVAILABLE


@pytest.fixture
def process(tiny_llama_dir: Path, tmp_path: Path) -> Iterator["subprocess.Popen[str]"]:
    """`patchclamp serve` in a process of its own."""
    command = [sys.executable, "-m", "patchclamp_server.cli", "--model", str(tiny_llama_dir)]
    addresses = ["--address", "127.0.0.1:0", "--metrics-address", "127.0.0.1:0", "--artifacts-url", str(tmp_path)]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    with (tmp_path / "log").open("w") as log:
        process = subprocess.Popen(
            [*command, *addresses], stdout=subprocess.PIPE, stderr=log, text=True, env=environment
        )
    yield process
    process.kill()
    process.wait()


def ends_with(channel: grpc.Channel) -> grpc.StatusCode:
    call = GenerationServiceStub(channel).Generate(request())
    try:
        list(call)
    except grpc.RpcError as error:
        return error.code()
    return call.code()


def address_of(process: "subprocess.Popen[str]") -> str:
    assert process.stdout is not None
    line = process.stdout.readline()
    assert line.startswith("serving on "), line
    return line.split()[2].rstrip(",")


def test_sigterm_lets_a_running_stream_finish_and_refuses_new_ones(process: "subprocess.Popen[str]"):
    with grpc.insecure_channel(address_of(process)) as channel:
        statuses = health_pb2_grpc.HealthStub(channel).Watch(health_pb2.HealthCheckRequest())
        assert next(statuses).status == SERVING
        # Lockstep: the stream is still running when the signal comes, however fast the machine is.
        sent: queue.Queue[pb.SessionRequest | None] = queue.Queue()
        sent.put(pb.SessionRequest(start=pb.SessionStart(request=LONG, lockstep=True)))
        stream = GenerationServiceStub(channel).Session(iter(sent.get, None))
        sent.put(pb.SessionRequest(advance=pb.Advance(tokens=1)))
        first = next(stream)
        process.send_signal(signal.SIGTERM)
        assert next(statuses).status == NOT_SERVING
        until(lambda: ends_with(channel) is grpc.StatusCode.UNAVAILABLE)
        sent.put(pb.SessionRequest(advance=pb.Advance(tokens=239)))
        responses = [first, *stream]
        sent.put(None)
        assert sum(len(r.tokens) for r in responses) == 240
        assert responses[-1].finished.reason == pb.FINISH_REASON_LENGTH
    assert process.wait(timeout=PATIENCE_SECONDS) == 0


def test_an_idle_server_ends_at_once(process: "subprocess.Popen[str]"):
    address_of(process)
    process.send_signal(signal.SIGINT)
    assert process.wait(timeout=PATIENCE_SECONDS) == 0


def test_whoever_interrupts_a_server_is_told_what_it_waits_for(process: "subprocess.Popen[str]", tmp_path: Path):
    address_of(process)
    process.send_signal(signal.SIGINT)
    process.wait(timeout=PATIENCE_SECONDS)
    log = (tmp_path / "log").read_text()
    assert "stopping: running calls have 30 s to finish; a second signal ends at once" in log


def test_work_beyond_the_drain_time_is_cancelled(
    live_server: LiveServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    # As on a machine so loaded that the call takes longer to end than statuses have to be written.
    monkeypatch.setattr("patchclamp_server.rpc.server.FLUSH_SECONDS", 0.0)
    with (
        LiveServer(live_server.model, tmp_path, drain_seconds=0.0) as server,
        grpc.insecure_channel(server.address) as channel,
    ):
        sent: queue.Queue[pb.SessionRequest | None] = queue.Queue()
        sent.put(pb.SessionRequest(start=pb.SessionStart(request=LONG, lockstep=True)))
        sent.put(pb.SessionRequest(advance=pb.Advance(tokens=1)))
        stream = GenerationServiceStub(channel).Session(iter(sent.get, None))
        next(stream)
        server.run(server.server.stop())
        with pytest.raises(grpc.RpcError) as caught:
            list(stream)
        sent.put(None)
        ended = failure(caught.value)
        assert (ended.code, ended.reason) == (grpc.StatusCode.UNAVAILABLE, "DRAINING")


def test_a_drain_tells_every_connection_to_leave_while_its_streams_go_on(live_server: LiveServer, tmp_path: Path):
    with LiveServer(live_server.model, tmp_path) as server, grpc.insecure_channel(server.address) as channel:
        states: queue.Queue[grpc.ChannelConnectivity] = queue.Queue()
        sent: queue.Queue[pb.SessionRequest | None] = queue.Queue()
        sent.put(pb.SessionRequest(start=pb.SessionStart(request=LONG, lockstep=True)))
        sent.put(pb.SessionRequest(advance=pb.Advance(tokens=1)))
        stream = GenerationServiceStub(channel).Session(iter(sent.get, None))
        first = next(stream)
        channel.subscribe(states.put)
        assert states.get(timeout=PATIENCE_SECONDS) is grpc.ChannelConnectivity.READY
        stopping = server.begin(server.server.stop())
        assert states.get(timeout=PATIENCE_SECONDS) is not grpc.ChannelConnectivity.READY
        sent.put(pb.SessionRequest(advance=pb.Advance(tokens=239)))
        assert sum(len(response.tokens) for response in [first, *stream]) == 240
        sent.put(None)
        stopping.result()


def test_a_taken_port_is_an_error_and_not_a_second_server(live_server: LiveServer, tmp_path: Path):
    second = LiveServer(live_server.model, tmp_path, address=live_server.address)
    with pytest.raises(OSError, match=f"--address {live_server.address}: address already in use"), second:
        pass
