"""Where a server listens: every form of an address, ports that are taken, and what the HTTP port answers."""

import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from urllib.error import HTTPError
from urllib.request import urlopen

import grpc
import pytest
from grpc_reflection.v1alpha import reflection_pb2
from live import LiveServer

from patchclamp import Client
from patchclamp_server.addresses import Address, Reservation
from patchclamp_server.cli.commands import main
from patchclamp_server.model.load import load_model
from patchclamp_server.rpc.contract import SERVICES
from patchclamp_server.rpc.reflection import V1


@pytest.mark.parametrize(
    ("text", "address"),
    [
        ("127.0.0.1:50051", Address("127.0.0.1", 50051)),
        ("host.example.org:0", Address("host.example.org", 0)),
        ("[::1]:9464", Address("::1", 9464)),
        ("::1:9464", Address("::1", 9464)),
        ("unix:run/patchclamp.sock", Address(path="run/patchclamp.sock")),
        ("unix:///run/patchclamp.sock", Address(path="/run/patchclamp.sock")),
    ],
)
def test_every_option_takes_every_form_of_an_address(text: str, address: Address):
    assert Address.parse(text) == address
    assert Address.parse(str(address)) == address


@pytest.mark.parametrize("text", ["50051", ":50051", "host:", "host:x", "host:65536", "a:b:1", "[host]:1", "unix:"])
def test_anything_else_is_refused_with_what_is_accepted(text: str):
    with pytest.raises(ValueError, match=r"expected host:port, \[IPv6 address\]:port or unix:path, got"):
        Address.parse(text)


@pytest.mark.parametrize("text", ["127.0.0.1:0", "localhost:0", "[::1]:0", "127.3.2.1:0", "unix:socket"])
def test_loopback_stays_on_this_machine(text: str):
    assert Address.parse(text).is_loopback


@pytest.mark.parametrize("text", ["0.0.0.0:0", "[::]:0", "10.0.0.1:0", "host:0", "localhost.example.org:0"])
def test_other_addresses_do_not(text: str):
    assert not Address.parse(text).is_loopback


def test_grpc_health_and_metrics_are_served_at_ipv6_addresses_in_brackets(live_server: LiveServer, tmp_path: Path):
    addresses = dict.fromkeys(("address", "metrics_address", "health_address"), "[::1]:0")
    with LiveServer(live_server.model, tmp_path, **addresses) as server, Client(server.address) as client:
        assert server.address.startswith("[::1]:")
        assert client.health() == "serving"
        with urlopen(f"http://[::1]:{server.server.metrics_port}/metrics") as response:
            assert b"patchclamp_serving 1.0" in response.read()
        with Client(server.server.health_address) as health:
            assert health.health() == "serving"


def test_a_file_that_is_no_socket_is_named_before_the_model_loads_and_stays(tmp_path: Path):
    path = tmp_path / "notes"
    path.write_text("mine")
    with pytest.raises(OSError, match=f"--address unix:{path}: {path} is there and is no socket"):
        Reservation({"--address": Address(path=str(path))})
    assert path.read_text() == "mine"


def test_a_unix_socket_is_served_and_replaces_one_that_a_killed_server_left(live_server: LiveServer, tmp_path: Path):
    path = tmp_path / "patchclamp.sock"
    with socket.socket(socket.AF_UNIX) as left:
        left.bind(str(path))
    Reservation({"--address": Address(path=str(path))})
    with LiveServer(live_server.model, tmp_path, address=f"unix:{path}") as server, Client(server.address) as client:
        assert server.address == f"unix:{path}"
        assert client.generate("Hi", max_tokens=1).result().usage.generated_tokens == 1


def test_a_socket_that_is_served_is_not_taken_over(live_server: LiveServer, tmp_path: Path):
    path = tmp_path / "patchclamp.sock"
    with (
        LiveServer(live_server.model, tmp_path, address=f"unix:{path}"),
        pytest.raises(OSError, match=f"--address unix:{path}: address already in use"),
    ):
        Reservation({"--address": Address(path=str(path))})


@pytest.fixture
def taken() -> Iterator[str]:
    with socket.create_server(("127.0.0.1", 0)) as listening:
        yield f"127.0.0.1:{listening.getsockname()[1]}"


@pytest.mark.parametrize("option", ["--address", "--metrics-address", "--health-address"])
def test_a_taken_port_is_named_with_its_option_before_the_model_is_loaded(
    option: str, taken: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
):
    monkeypatch.setenv("NUMBA_CACHE_DIR", str(tmp_path))
    free = {"--address": "127.0.0.1:0", "--metrics-address": "127.0.0.1:0"}
    arguments = [part for pair in {**free, option: taken}.items() for part in pair]
    assert main(["--model", "/nowhere/model", *arguments]) == 1
    assert capsys.readouterr().err == f"patchclamp serve: error: {option} {taken}: address already in use\n"


def test_a_port_is_held_while_the_model_loads_and_free_for_its_server_then():
    # A port that the system gave for listening: connections that other tests open take others. One of theirs would
    # count as lingering.
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port = found.getsockname()[1]
    address = Address("127.0.0.1", port)
    first = Reservation({"--address": address})
    with pytest.raises(OSError, match="in use"):
        Reservation({"--address": address})
    first.release()
    Reservation({"--address": address}).release()


def test_a_port_whose_connections_linger_is_no_taken_port():
    code = (
        "import socket\n"
        "server = socket.create_server(('127.0.0.1', 0))\n"
        "client = socket.create_connection(server.getsockname())\n"
        "accepted, _ = server.accept()\n"
        # The side that closes first keeps the port in TIME_WAIT.
        "accepted.close(); client.recv(1); client.close()\n"
        "print(server.getsockname()[1])\n"
    )
    port = int(subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout)
    Reservation({"--address": Address("127.0.0.1", port)}).release()


def test_healthz_says_what_health_says(live_server: LiveServer):
    with urlopen(f"http://127.0.0.1:{live_server.server.metrics_port}/healthz") as response:
        assert (response.status, response.read()) == (200, b"SERVING\n")


@pytest.mark.parametrize("path", ["/", "/health", "/metrics/x"])
def test_other_paths_of_the_http_port_are_not_found(live_server: LiveServer, path: str):
    with pytest.raises(HTTPError) as caught:
        urlopen(f"http://127.0.0.1:{live_server.server.metrics_port}{path}")
    assert (caught.value.code, caught.value.read()) == (404, b"this port has /metrics and /healthz\n")


def test_healthz_fails_with_the_engine(tiny_llama_dir: Path, tmp_path: Path):
    with LiveServer(load_model(str(tiny_llama_dir)), tmp_path) as server:
        server.server.engine.shutdown()
        # The engine's thread tells the loop, which has then run what came before this.
        server.run(server.server._asked_to_end.wait())
        with pytest.raises(HTTPError) as caught:
            urlopen(f"http://127.0.0.1:{server.server.metrics_port}/healthz")
    assert caught.value.code == 503
    assert caught.value.read() == b"NOT_SERVING\n"


@pytest.mark.parametrize("service", [V1, "grpc.reflection.v1alpha.ServerReflection"])
def test_reflection_speaks_v1_and_v1alpha(channel: grpc.Channel, service: str):
    call = channel.stream_stream(
        f"/{service}/ServerReflectionInfo",
        reflection_pb2.ServerReflectionRequest.SerializeToString,
        reflection_pb2.ServerReflectionResponse.FromString,
    )
    asked = [
        reflection_pb2.ServerReflectionRequest(list_services=""),
        reflection_pb2.ServerReflectionRequest(file_containing_symbol="patchclamp.v1.GenerationService"),
    ]
    listed, described = call(iter(asked))
    assert {s.name for s in listed.list_services_response.service} >= {*SERVICES, V1}
    assert described.file_descriptor_response.file_descriptor_proto
