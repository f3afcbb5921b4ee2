"""What the client sends where."""

from pathlib import Path

import pytest

from patchclamp import Client
from patchclamp.aio import AsyncClient
from patchclamp.cli.app import build_parser
from patchclamp.cli.options import connect
from patchclamp.connection import Connection

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
