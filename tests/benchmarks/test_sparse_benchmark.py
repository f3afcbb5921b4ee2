"""benchmarks/sparse on random weights: everything runs, and the last line says what was found."""

import importlib.util
import json
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
KEEPS = {"0.75", "0.5", "0.4", "0.3"}


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    program = [sys.executable, str(BENCHMARKS / "sparse"), "--tiny", *arguments]
    return subprocess.run(program, capture_output=True, text=True, timeout=300, check=False)


def module(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, BENCHMARKS / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    loaded = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(loaded)
    return loaded


def card(ratio: float) -> dict[str, float]:
    return {"perplexity_ratio": ratio}


def test_the_last_line_has_the_quality_of_every_policy_and_the_speed_of_both_tables() -> None:
    results = {path: path.stat().st_mtime_ns for path in (BENCHMARKS / "results").glob("*.json")}
    done = run()
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    last = json.loads(done.stdout.splitlines()[-1])
    assert set(last["quality"].pop("dense")) == set(last["quality"].pop("exact_zero")) == {"1"}
    assert {"fovea", "cats", "griffin", "random", "oracle"} < set(last["quality"])
    assert all(set(ratios) == KEEPS for ratios in last["quality"].values())
    assert set(last["ours_is_best"]) == KEEPS
    quality = last["quality"]
    for keep in ("50", "30"):
        assert last[f"best_ratio_keep{keep}"] == quality[last[f"best_policy_keep{keep}"]][f"0.{keep[0]}"]
    assert last["random_ratio_keep50"] == quality["random"]["0.5"]
    assert last["fixed_set_speed_vs_bound_keep50"] > 0
    assert set(last["fovea_speedup_keep50"]) == {"embedded_codes", "8b_float32", "8b_bfloat16"}
    # Random weights are no result.
    assert results == {path: path.stat().st_mtime_ns for path in (BENCHMARKS / "results").glob("*.json")}


def test_one_part_can_be_measured_alone() -> None:
    done = run("--only", "quality", "--policies", "random", "cats", "--keep", "0.5")
    assert done.returncode == 0, done.stderr[-2000:]
    last = json.loads(done.stdout.splitlines()[-1])
    assert set(last["quality"]) == {"random", "cats"}
    assert last["best_policy_keep50"] == "cats"
    assert last["best_policy_keep30"] is None
    assert "fixed_set_speed_vs_bound_keep50" not in last


def test_the_best_policy_is_one_that_can_be_served() -> None:
    table = {
        "dense": {"1": card(1.0)},
        "oracle": {"0.5": card(1.02)},
        "random": {"0.5": card(90.0)},
        "cats": {"0.5": card(1.3), "0.3": card(3.0)},
        "fovea": {"0.5": card(1.1), "0.3": card(3.5)},
    }
    found = module("sparse/quality").summary(table)
    assert (found["best_policy_keep50"], found["best_ratio_keep50"]) == ("fovea", 1.1)
    assert (found["best_policy_keep30"], found["best_ratio_keep30"]) == ("cats", 3.0)
    assert found["random_ratio_keep50"] == 90.0
    assert found["ours_is_best"] == {"0.5": True, "0.3": False}


def test_bounds_count_what_cannot_be_skipped(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    bound = module("sparse/speed")._bound
    assert bound("fixed", 0.5, False) == pytest.approx(2.0)
    assert bound("gate", 0.5, False) == pytest.approx(1.5)
    # A third of an output projection in codes is scales, and those a third of the MLP.
    assert bound("fixed", 0.5, True) == pytest.approx(1 / (1 - 8 / 9 / 2))
    assert bound("channels", 0.3, True) == pytest.approx(1 / (1 - 2 / 3 * 0.7))
