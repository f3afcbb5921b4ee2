"""What the client sends where."""

import json
from pathlib import Path
from typing import Any

import pytest

from patchclamp import Client
from patchclamp.aio import AsyncClient
from patchclamp.cli.app import build_parser
from patchclamp.cli.options import connect
from patchclamp.connection import Connection
from patchclamp_server.rpc.contract import SERVICES

VARIABLES = ("TOKEN", "TOKEN_FILE", "CA", "CERT", "KEY")


@pytest.fixture(autouse=True)
def no_variables(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in VARIABLES:
        monkeypatch.delenv(f"PATCHCLAMP_{name}", raising=False)


@pytest.mark.parametrize("address", ["localhost:1", "127.0.0.1:1", "127.1.2.3:1", "[::1]:1", "unix:/run/patchclamp"])
def test_a_token_goes_to_this_machine_in_clear(address: str):
    assert Connection(address, "t").metadata == (("authorization", "Bearer t"),)


@pytest.mark.parametrize(
    "address", ["example.org:1", "10.0.0.1:1", "0.0.0.0:1", "localhost.example.org:1", "dns:///h:1"]
)
def test_a_token_does_not_go_elsewhere_without_tls(address: str):
    with pytest.raises(ValueError, match="the token is not sent to"):
        Connection(address, "t")
    assert Connection(address, "t", tls=True).metadata
    assert Connection(address, "t", token_in_clear=True).metadata


@pytest.mark.parametrize("client", [Client, AsyncClient])
def test_both_clients_refuse_before_anything_is_sent(client: type[Client] | type[AsyncClient]):
    with pytest.raises(ValueError, match="the token is not sent to"):
        client("example.org:1", token="t")


def test_a_certificate_needs_its_key_and_tls():
    with pytest.raises(ValueError, match="belong together"):
        Connection(tls=True, certificate="c.pem")
    with pytest.raises(ValueError, match="needs TLS"):
        Connection(certificate="c.pem", key="c.key")


def token_of(*arguments: str) -> str | None:
    with connect(build_parser().parse_args(["models", *arguments])) as client:
        return client._connection.token


def test_the_command_reads_the_token_from_a_file_or_a_variable(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    assert token_of() is None
    monkeypatch.setenv("PATCHCLAMP_TOKEN", "of the variable")
    assert token_of() == "of the variable"
    (tmp_path / "token").write_text("of the file\n")
    assert token_of("--token-file", str(tmp_path / "token")) == "of the file"
    monkeypatch.setenv("PATCHCLAMP_TOKEN_FILE", str(tmp_path / "token"))
    assert token_of() == "of the file"


@pytest.mark.parametrize(
    "address",
    [
        "ipv4:127.0.0.1:1,127.0.0.1:2",
        "ipv6:[::1]:1,[::1]:2",
        "dns:localhost:1",
        "dns:///127.0.0.1:1",
        "unix-abstract:p",
    ],
)
def test_a_token_goes_in_clear_to_several_ports_of_this_machine(address: str):
    assert Connection(address, "t").metadata


@pytest.mark.parametrize(
    "address",
    [
        "ipv4:127.0.0.1:1,10.0.0.1:2",
        "ipv4:10.0.0.1:2,127.0.0.1:1",
        # A name, not an address; and a name that another machine is asked for.
        "127.example.org:1",
        "dns://10.0.0.1/localhost:1",
        "xds:///localhost:1",
    ],
)
def test_one_address_elsewhere_is_enough_to_keep_the_token(address: str):
    with pytest.raises(ValueError, match="the token is not sent to"):
        Connection(address, "t")


def options(address: str, **given: Any) -> dict[str, Any]:
    return dict(Connection(address, **given).options)


@pytest.mark.parametrize(
    "address", ["ipv4:10.0.0.1:1,10.0.0.2:1", "dns:///patchclamp:1", "patchclamp.example.org:1", "ipv6:[::1]:1,[::1]:2"]
)
def test_calls_are_balanced_by_health_where_an_address_can_mean_several_servers(address: str):
    config = json.loads(options(address)["grpc.service_config"])
    assert config["loadBalancingConfig"] == [{"round_robin": {}}]
    assert config["healthCheckConfig"]["serviceName"] in SERVICES


@pytest.mark.parametrize("address", ["localhost:1", "10.0.0.1:1", "[::1]:1", "::1", "ipv4:10.0.0.1:1", "unix:/run/p"])
def test_one_server_is_called_whatever_its_health_says(address: str):
    assert "grpc.service_config" not in options(address)


def test_arguments_of_the_channel_replace_ours_and_add_to_them():
    given = options("localhost:1", channel_options={"grpc.keepalive_time_ms": 5, "grpc.max_metadata_size": 7})
    assert (given["grpc.keepalive_time_ms"], given["grpc.max_metadata_size"]) == (5, 7)
    assert given["grpc.enable_retries"] == 0


def test_the_name_in_the_certificate_needs_tls():
    assert options("10.0.0.1:1", tls=True, tls_server_name="p")["grpc.ssl_target_name_override"] == "p"
    with pytest.raises(ValueError, match="needs TLS"):
        Connection("10.0.0.1:1", tls_server_name="p")
