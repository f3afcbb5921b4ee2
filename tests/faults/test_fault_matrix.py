"""benchmarks/faults on a tiny model: every fault is done to a real server, and nothing is lost by any."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
FAULTS = {
    "cancel",
    "deadline",
    "disconnect",
    "slow reader",
    "kill -9 during uploads",
    "kill -9 during a calibration",
    "SIGTERM under load",
    "disk full",
    "corrupted artifact",
    "a step fails",
    "out of memory",
    "every step fails",
    "bad certificate",
    "expired token",
}


def test_nothing_is_lost_by_any_fault() -> None:
    command = [sys.executable, str(BENCHMARKS / "faults"), "--tiny"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=550, check=False)
    assert done.returncode == 0, done.stdout + done.stderr[-4000:]
    lines = done.stdout.splitlines()
    printed = {line for line in lines if line and not line.startswith((" ", "{"))}
    assert printed >= FAULTS
    last = json.loads(lines[-1])
    assert (last["lost"], last["unexpected"], last["faults"]) == (0, 0, len(printed))


@pytest.fixture
def module(monkeypatch: pytest.MonkeyPatch) -> object:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    from faults import rows

    return rows


def test_what_was_lost_and_an_unexpected_status_show(module: object) -> None:
    row = module.Row("f", "sent", "INTERNAL", "OK", {"tokens": 0, "artifacts": ["sha256:12"]})  # type: ignore[attr-defined]
    assert not row.lost_nothing
    assert "EXPECTED: OK" in row.as_text()
    assert "sha256:12" in row.as_text()
