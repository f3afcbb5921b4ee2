"""TLS as a client meets it: names of certificates, and mistakes that gRPC reports in other words."""

import socket
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc
import pytest
from canned import Models
from certificates import Authority, Issued

from patchclamp import AsyncClient, Client, PatchclampError
from patchclamp.cli.app import main
from patchclamp.v1.model_pb2_grpc import add_ModelServiceServicer_to_server


@dataclass
class Ports:
    """Of one server: without TLS, with it, and with certificates of clients."""

    plain: str
    tls: str
    mutual: str
    authority: Authority
    client: Issued


@pytest.fixture(scope="module")
def ports(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Ports]:
    authority = Authority(tmp_path_factory.mktemp("ca"))
    issued = authority.issue("patchclamp", names=("patchclamp.internal",))
    pairs = [(issued.key.read_bytes(), issued.certificate.read_bytes())]
    server = grpc.server(ThreadPoolExecutor(max_workers=2))
    add_ModelServiceServicer_to_server(Models(), server)
    plain = server.add_insecure_port("127.0.0.1:0")
    tls = server.add_secure_port("127.0.0.1:0", grpc.ssl_server_credentials(pairs))
    asks = grpc.ssl_server_credentials(pairs, authority.root.read_bytes(), require_client_auth=True)
    mutual = server.add_secure_port("127.0.0.1:0", asks)
    server.start()
    addresses = (f"127.0.0.1:{port}" for port in (plain, tls, mutual))
    yield Ports(*addresses, authority, authority.issue("client"))
    server.stop(None).wait()


def failed(address: str, **options: Any) -> str:
    """What is said of a call that cannot reach its server; it is repeated for as long as it may take."""
    # On a loaded machine half a second may end before the first attempt has.
    for timeout in (0.5, 20.0):
        with Client(address, timeout=timeout, **options) as client, pytest.raises(PatchclampError) as caught:
            client.models()
        if caught.value.code == "UNAVAILABLE":
            break
    assert caught.value.code == "UNAVAILABLE"
    assert caught.value.hint in str(caught.value)
    return caught.value.hint


def test_a_client_without_tls_is_told_that_the_server_may_speak_it(ports: Ports):
    hint = failed(ports.tls)
    assert "it may speak TLS" in hint
    assert "--ca" in hint
    assert failed(f"ipv4:{ports.tls},{ports.tls}") == hint


def test_a_client_with_tls_is_told_that_the_server_does_not_speak_it(ports: Ports):
    assert "the server does not speak TLS" in failed(ports.plain, tls=ports.authority.root)


def test_a_client_without_a_certificate_is_told_that_one_may_be_wanted(ports: Ports):
    assert "--cert" in failed(ports.mutual, tls=ports.authority.root)
    own = {"certificate": ports.client.certificate, "key": ports.client.key}
    with Client(ports.mutual, tls=ports.authority.root, **own) as client:
        assert client.models() == ()


def test_a_certificate_of_another_authority_is_called_that(ports: Ports, tmp_path: Path):
    for name in ("ca", "another"):
        assert "authority" in failed(ports.tls, tls=Authority(tmp_path / name, name).root)


def test_a_port_that_speaks_no_grpc_is_called_that():
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
        answering = threading.Thread(target=_answer_in_http_1, args=(listener,), daemon=True)
        answering.start()
        assert "--address" in failed(f"127.0.0.1:{port}")


def _answer_in_http_1(listener: socket.socket) -> None:
    while True:
        try:
            connection, _ = listener.accept()
        except OSError:
            return
        with connection:
            connection.recv(1024)
            connection.sendall(b"HTTP/1.0 400 Bad Request\r\n\r\n")


def test_a_url_in_place_of_an_address_is_told_what_an_address_is():
    assert "without http://" in failed("http://127.0.0.1:50051")


def test_a_server_that_is_not_there_is_called_that(ports: Ports):
    assert "nothing listens there" in failed("127.0.0.1:1")


def test_the_name_in_the_certificate_may_be_another_than_the_address(ports: Ports):
    assert "--tls-server-name" in failed(ports.tls, tls=ports.authority.root, tls_server_name="elsewhere.internal")
    with Client(ports.tls, tls=ports.authority.root, tls_server_name="patchclamp.internal") as client:
        assert client.models() == ()


async def test_the_async_client_takes_the_name_too(ports: Ports):
    name = {"tls": ports.authority.root, "tls_server_name": "patchclamp.internal"}
    async with AsyncClient(ports.tls, **name) as client:
        assert await client.models() == ()


def test_the_command_line_takes_the_name_and_arguments_of_the_channel(ports: Ports, capsys: pytest.CaptureFixture[str]):
    to_server = ["models", "--address", ports.tls, "--ca", str(ports.authority.root), "--timeout", "0.5"]
    assert main([*to_server, "--tls-server-name", "patchclamp.internal"]) == 0
    assert main([*to_server, "--channel-option", "grpc.ssl_target_name_override=elsewhere.internal"]) == 1
    assert "--tls-server-name" in capsys.readouterr().err


def test_a_mistake_about_tls_is_told_by_the_command_line(ports: Ports, capsys: pytest.CaptureFixture[str]):
    assert main(["models", "--address", ports.tls, "--timeout", "0.5"]) == 1
    assert "it may speak TLS" in capsys.readouterr().err
