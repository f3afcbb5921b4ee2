"""The benchmark of products runs all that this machine has, on the same product."""

import json
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]


def test_every_way_is_checked_and_timed() -> None:
    command = [sys.executable, "benchmarks/products.py", "--quick", "--formats", "Q4_1", "Q6_K", "--seconds", "0.01"]
    output = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    rows = json.loads(output.splitlines()[-1])["rows"]
    assert {(row["format"], row["rows"]) for row in rows} == {
        (f, n) for f in ("Q4_1", "Q6_K") for n in (1, 4, 16, 64, 512)
    }
    for row in rows:
        dense = {"int4", "onednn", "float32"} if row["format"] == "Q4_1" else set()
        assert row["least_ms"].keys() == {"exact", "int8"} | dense
        assert min(row["least_ms"].values()) > 0
