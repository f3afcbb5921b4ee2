"""The examples that call a running server do what they say, on a tiny model."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from live import LiveServer


def test_the_async_example_answers_four_programs_and_leaves_a_stream_early(examples: Path, server: LiveServer) -> None:
    program = [sys.executable, str(examples / "async_client.py"), "--address", server.address]
    done = subprocess.run(program, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    for name in ("unedited", "liking", "disliking", "without two heads"):
        assert f"\n{name}:" in f"\n{done.stdout}"
    assert done.stdout.count(": edited") == 3
    assert "left after" in done.stdout


@pytest.fixture(scope="module")
def typescript() -> list[str]:
    """How to run the client in TypeScript, built anew."""
    folder = Path(__file__).parents[2] / "examples" / "typescript"
    if not shutil.which("npm"):
        pytest.skip("examples/typescript: node and npm are not here")
    if not (folder / "node_modules").is_dir():
        pytest.skip("examples/typescript: its packages are not installed (npm install)")
    built = subprocess.run(
        ["npm", "run", "build"], cwd=folder, capture_output=True, text=True, timeout=120, check=False
    )
    assert built.returncode == 0, built.stdout + built.stderr
    return ["node", str(folder / "dist" / "generate.js")]


def run_typescript(command: list[str], server: LiveServer, *arguments: str) -> "subprocess.CompletedProcess[str]":
    environment = {**os.environ, "PATCHCLAMP_ADDRESS": server.address}
    return subprocess.run(
        [*command, *arguments], env=environment, capture_output=True, text=True, timeout=60, check=False
    )


def test_the_typescript_client_streams_a_steered_answer_with_its_receipt(
    typescript: list[str], server: LiveServer
) -> None:
    done = run_typescript(typescript, server, "My day was", "liking@1:1.5")
    assert done.returncode == 0, done.stderr
    assert done.stdout
    assert "liking: " in done.stderr
    assert "of the norm" in done.stderr


def test_the_typescript_client_ends_with_the_reason_of_a_refusal(typescript: list[str], server: LiveServer) -> None:
    done = run_typescript(typescript, server, "My day was", "liking@99:1.5")
    assert done.returncode == 1
    assert done.stderr.startswith("INVALID_ARGUMENT: ")
