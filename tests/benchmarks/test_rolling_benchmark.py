"""benchmarks/rolling.py on a tiny model: two servers are restarted under load, and no call is lost."""

import json
import subprocess
import sys
from pathlib import Path

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


def test_a_rolling_restart_loses_no_call_and_both_servers_work() -> None:
    results = {path: path.stat().st_mtime_ns for path in (BENCHMARKS / "results").glob("*.json")}
    program = [sys.executable, str(BENCHMARKS / "rolling.py"), "--tiny"]
    done = subprocess.run(program, capture_output=True, text=True, timeout=550, check=False)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    last = json.loads(done.stdout.splitlines()[-1])
    assert last["lost_calls"] == 0
    assert last["balance_of_two"] >= 0.4
    assert last["exit_statuses"] == [0, 0]
    # Every kind of call was made, by both clients.
    assert len(last["answered_calls"]) == 6
    assert results == {path: path.stat().st_mtime_ns for path in (BENCHMARKS / "results").glob("*.json")}
