"""examples/newcomer.py on a tiny model: install line, own vector, gate, watch and rolling restart are as it says."""

import subprocess
import sys
from pathlib import Path


def test_the_path_of_a_newcomer_holds_from_the_install_line_to_a_rolling_restart(
    examples: Path, tiny_llama_dir: Path
) -> None:
    program = [sys.executable, str(examples / "newcomer.py"), f"--model={tiny_llama_dir}", "--untrained"]
    done = subprocess.run(program, capture_output=True, text=True, timeout=550, check=False)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]
    for seen in (
        "the client needs no torch",
        "the gate compared with the midpoint of the evidence",
        "threshold and buckets come from the reference",
        "no call was lost",
    ):
        assert f"ok: {seen}" in done.stdout


def test_a_server_that_does_not_start_ends_it_with_a_reason(examples: Path, tmp_path: Path) -> None:
    program = [sys.executable, str(examples / "newcomer.py"), f"--model={tmp_path / 'nowhere'}", "--skip-install"]
    done = subprocess.run(program, capture_output=True, text=True, timeout=200, check=False)
    assert done.returncode == 1
    assert "not as expected: the server did not start" in done.stderr
