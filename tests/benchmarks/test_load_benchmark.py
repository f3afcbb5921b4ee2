"""benchmarks/load on a tiny model: the whole course of it, and what must hold under any load."""

import json
import subprocess
import sys
from pathlib import Path

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
SHORT = ["--seconds=3", "--capacity-seconds=1", "--max-sequences=4", "--max-waiting=4", "--kv-cache-tokens=1024"]


def test_a_server_under_four_times_its_load_refuses_politely_and_loses_nothing(tiny_llama_dir: Path) -> None:
    results = {path: path.stat().st_mtime_ns for path in (BENCHMARKS / "results").glob("*.json")}
    program = [sys.executable, str(BENCHMARKS / "load"), *SHORT, "--longest-prompt=16", "--closed-requests=200"]
    done = subprocess.run(
        [*program, f"--model={tiny_llama_dir}"], capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    last = json.loads(done.stdout.splitlines()[-1])
    assert last["refused_with_retry_info"] == 1.0
    assert last["stuck_streams"] == 0
    assert last["kv_blocks_held_after"] == 0
    assert set(last["health"]) == {"serving"}
    assert set(last["outcomes"]) <= {"ok", "RESOURCE_EXHAUSTED", "DEADLINE_EXCEEDED"}
    assert last["outcomes"]["RESOURCE_EXHAUSTED"] > 0
    # How much of its capacity a server keeps is for a machine that does nothing else to say.
    assert last["goodput_ratio"] > 0
    assert last["rss_growth_ratio"] < 2.0
    assert results == {path: path.stat().st_mtime_ns for path in (BENCHMARKS / "results").glob("*.json")}
