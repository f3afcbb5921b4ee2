"""What `patchclamp serve` makes of its options of security, before it serves."""

import argparse
import logging
from pathlib import Path

import pytest
from certificates import Authority
from live import LiveServer

from patchclamp import Client
from patchclamp_server.cli.commands import main
from patchclamp_server.cli.options import add_serve_arguments, config_from
from patchclamp_server.rpc.at_start import check_files
from patchclamp_server.rpc.config import ServerConfig
from patchclamp_server.security.configuration import ConfigurationError


def parse(*arguments: str) -> ServerConfig:
    parser = argparse.ArgumentParser(exit_on_error=False)
    add_serve_arguments(parser)
    return config_from(parser.parse_args(arguments))


def test_every_option_arrives():
    files = ("tls_certificate", "tls_key", "tls_client_ca", "tokens", "policy", "audit_log")
    given = [argument for name in files for argument in (f"--{name.replace('_', '-')}", f"/{name}")]
    config = parse(*given, "--audit-prompts", "on", "--metrics-tls", "on")
    assert [getattr(config, name) for name in files] == [f"/{name}" for name in files]
    assert (config.audit_prompts, config.metrics_tls) == (True, True)
    assert not parse("--audit-prompts", "off").audit_prompts


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--tokens", "/nowhere/tokens"], "cannot read /nowhere/tokens: No such file or directory"),
        (["--policy", "/nowhere/policy.yaml"], "cannot read /nowhere/policy.yaml: No such file or directory"),
        (["--tls-certificate", "/nowhere/c.pem"], "--tls-certificate and --tls-key belong together"),
        (["--audit-log", "/dev/null/audit"], "cannot write the audit log /dev/null/audit: Not a directory"),
    ],
    ids=["tokens", "policy", "certificate", "audit log"],
)
def test_a_file_that_cannot_be_used_is_named(arguments: list[str], message: str):
    with pytest.raises(ConfigurationError) as caught:
        check_files(parse(*arguments))
    assert str(caught.value) == message


def test_the_command_ends_before_the_model_is_loaded(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
):
    monkeypatch.setenv("NUMBA_CACHE_DIR", str(tmp_path))
    assert main(["--model", "/nowhere/model", "--tokens", "/nowhere/tokens"]) == 1
    assert (
        capsys.readouterr().err == "patchclamp serve: error: cannot read /nowhere/tokens: No such file or directory\n"
    )


def test_nothing_is_asked_of_a_caller_on_loopback_and_nothing_warned(
    live_server: LiveServer, tmp_path: Path, caplog: pytest.LogCaptureFixture
):
    with LiveServer(live_server.model, tmp_path) as server, Client(server.address) as client:
        assert client.models()
    assert "open to the network" not in caplog.text


@pytest.mark.parametrize(
    ("tls", "tokens", "warning"),
    [
        (False, False, "0.0.0.0:0 is open to the network: no TLS, and anybody may call"),
        (False, True, "0.0.0.0:0 is open to the network without TLS: tokens and prompts can be read on their way"),
        (True, False, "0.0.0.0:0 is open to the network and anybody may call"),
        (True, True, ""),
    ],
)
def test_an_open_address_is_warned_of(
    live_server: LiveServer, tmp_path: Path, caplog: pytest.LogCaptureFixture, tls: bool, tokens: bool, warning: str
):
    issued = Authority(tmp_path / "ca").issue()
    (tmp_path / "tokens").touch()
    files = {"tls_certificate": str(issued.certificate), "tls_key": str(issued.key)} if tls else {}
    if tokens:
        files["tokens"] = str(tmp_path / "tokens")
    with (
        caplog.at_level(logging.WARNING),
        LiveServer(live_server.model, tmp_path / "artifacts", address="0.0.0.0:0", **files),
    ):
        pass
    warned = [record.getMessage() for record in caplog.records if "open to the network" in record.getMessage()]
    assert [message.startswith(warning) for message in warned] == ([True] if warning else [])
