"""The front as a process of its own, and in that of its server."""

import json
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest
from live import LiveServer
from patience import PATIENCE_SECONDS
from patient_http import post

from patchclamp_http import Listening


@contextmanager
def running(*arguments: str) -> Iterator[tuple["subprocess.Popen[str]", dict[str, Any]]]:
    """A command of ours, and what it says once it serves."""
    process = subprocess.Popen([sys.executable, "-m", "patchclamp", *arguments], stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        yield process, json.loads(process.stdout.readline())
    finally:
        process.kill()
        process.wait()
        assert process.stdout is not None
        process.stdout.close()


def test_a_front_alone_serves_what_its_server_does_and_ends_when_told(live_server: LiveServer) -> None:
    with running("http", "--target", live_server.address, "--listen", "127.0.0.1:0", "--json") as (process, told):
        answer = post(f"{told['http']}/v1/completions", json={"prompt": "hello", "max_tokens": 4})
        assert answer.json()["usage"]["completion_tokens"] <= 4
        process.send_signal(signal.SIGTERM)
        assert process.wait(timeout=PATIENCE_SECONDS) == 0


def test_a_server_finishes_what_runs_over_http_when_it_is_told_to_end(tiny_llama_dir: Path, tmp_path: Path) -> None:
    ports = ("--address=127.0.0.1:0", "--metrics-address=127.0.0.1:0", "--http=127.0.0.1:0")
    model = (f"--model={tiny_llama_dir}", f"--artifacts-url={tmp_path}")
    body = {"prompt": "hello", "n": 16, "max_tokens": 240, "ignore_eos": True, "stream": True}
    with running("serve", *model, *ports, "--json") as (process, told):
        with httpx.stream("POST", f"{told['http']}/v1/completions", json=body, timeout=PATIENCE_SECONDS) as answer:
            lines = answer.iter_lines()
            next(lines)
            process.send_signal(signal.SIGTERM)
            events = [line.removeprefix("data: ") for line in lines if line]
        assert events[-1] == "[DONE]"
        ended = [json.loads(event)["choices"][0]["finish_reason"] for event in events[:-1]]
        assert ended.count("length") == 16
        assert process.wait(timeout=PATIENCE_SECONDS) == 0


def test_a_taken_port_is_named(live_server: LiveServer) -> None:
    taken = live_server.address
    ended = subprocess.run(
        [sys.executable, "-m", "patchclamp", "http", "--target", taken, "--listen", taken],
        capture_output=True,
        text=True,
        timeout=PATIENCE_SECONDS,
    )
    assert ended.returncode == 2
    assert f"error: {taken}: address already in use" in ended.stderr


@pytest.mark.parametrize("address", ["8000", "host:port", "host:99999", ":8000"])
def test_an_address_is_host_and_port(address: str) -> None:
    with pytest.raises(ValueError, match="expected host:port"):
        Listening.parse(address)


def test_a_certificate_needs_its_key() -> None:
    with pytest.raises(ValueError, match="belong together"):
        Listening("127.0.0.1", 0, certificate="front.pem")
