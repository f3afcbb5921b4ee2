"""benchmarks/gpu on a CPU: the same code on small shapes and the references, with nothing that a machine lent for
its GPU may lack."""

import copy
import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
BENCHMARKS = ROOT / "benchmarks"
ABSENT = ("grpc", "grpc_health", "grpc_reflection", "gguf", "patchclamp", "pytest")
# A checkout whose packages are not installed, on a machine without the packages above.
PREAMBLE = """
import runpy, sys

class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {absent}:
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)

sys.meta_path.insert(0, Absent())
sys.path[:0] = [{kernels!r}, {server!r}]
{plant}
sys.argv = [{script!r}, *sys.argv[1:]]
runpy.run_path({script!r}, run_name="__main__")
"""
PLANT = """
import patchclamp_kernels.token_choice as token_choice
right = token_choice.token_logprobs
def wrong(*given, **named):
    return right(*given, **named).mul_(1.01)
token_choice.token_logprobs = wrong
"""


def run_benchmark(output: Path, *arguments: str, plant: str = "") -> subprocess.CompletedProcess[str]:
    program = PREAMBLE.format(
        absent=ABSENT,
        kernels=str(ROOT / "kernels"),
        server=str(ROOT / "server"),
        plant=plant,
        script=str(BENCHMARKS / "gpu"),
    )
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    return subprocess.run(
        [sys.executable, "-c", program, "--device", "cpu", "--tiny", "--output", str(output), *arguments],
        capture_output=True,
        text=True,
        timeout=300,
        env=environment,
        check=False,
    )


def only_record(output: Path) -> dict[str, Any]:
    (path,) = output.glob("*.json")
    record: dict[str, Any] = json.loads(path.read_text())
    return record


@pytest.fixture(scope="module")
def whole_run(tmp_path_factory: pytest.TempPathFactory) -> tuple[subprocess.CompletedProcess[str], dict[str, Any]]:
    output = tmp_path_factory.mktemp("gpu")
    done = run_benchmark(output)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    return done, only_record(output)


def load(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, BENCHMARKS / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def report(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    return importlib.import_module("gpu.report")


@pytest.fixture
def processes(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    for folder in (ROOT / "server", Path(__file__).parent, BENCHMARKS):
        monkeypatch.syspath_prepend(str(folder))
    return importlib.import_module("gpu.processes")


def test_a_whole_run_needs_no_grpc_and_compares_and_times_every_op(
    whole_run: tuple[subprocess.CompletedProcess[str], dict[str, Any]],
) -> None:
    _, record = whole_run
    ops = {
        "paged_attention",
        "rope_kv_write",
        "residual_edits",
        "gated_activation",
        "sparse_mlp",
        "sparse_linear",
        "feature_clamp",
        "probe_statistics",
        "logit_lens_topk",
        "token_choice",
    }
    assert {row["op"] for row in record["checks"]} == ops | {"receipts"}
    assert {row["op"] for row in record["kernels"]} == ops
    assert all(row["ok"] for row in record["checks"])
    assert all(row["microseconds"] > 0 and row["bound_microseconds"] > 0 for row in record["kernels"])
    assert record["complete"]
    assert record["errors"] == {}


def test_the_engine_is_timed_steered_and_unsteered_beside_transformers(
    whole_run: tuple[subprocess.CompletedProcess[str], dict[str, Any]],
) -> None:
    _, record = whole_run
    cases = {row["case"] for row in record["engine"] if row["model"] == "tiny-qwen3"}
    steered = {"one layer", "all layers", "4 programs", "4 programs, all kinds", "neuron clamps"}
    assert cases >= steered | {"unsteered", "prefill, unsteered", "projections, 2 layers"}
    assert all("vs_ratio" in row for row in record["engine"] if row["case"] in steered)
    assert all(row["tokens_per_second"] > 0 for row in record["engine"] + record["baselines"])
    assert [row["ok"] for row in record["readiness"]] == [True, True]


def test_the_last_line_is_the_summary_by_goal(
    whole_run: tuple[subprocess.CompletedProcess[str], dict[str, Any]],
) -> None:
    done, record = whole_run
    summary = json.loads(done.stdout.splitlines()[-1])
    assert summary == record["summary"]
    assert set(summary) == set(load("readme").GOALS)
    # Nothing of 256 rows was measured: such a goal stays open.
    assert summary["all_layer_steering_256"]["met"] is None


def test_a_kernel_that_is_one_percent_off_fails_the_run(tmp_path: Path) -> None:
    done = run_benchmark(tmp_path, "--only", "kernels", "--op", "tokens", plant=PLANT)
    assert done.returncode == 1, done.stdout + done.stderr
    wrong = [row for row in only_record(tmp_path)["checks"] if not row["ok"]]
    assert wrong
    assert {row["op"] for row in wrong} == {"token_choice"}
    assert all("token logprobs" in row["case"] for row in wrong)
    assert "WRONG" in done.stdout


def test_tasks_in_processes_of_their_own_write_the_same_record(tmp_path: Path) -> None:
    given = ("--only", "kernels", "--op", "tokens", "--model", "tiny-llama", "--processes", "2")
    done = run_benchmark(tmp_path, *given)
    assert done.returncode == 0, done.stdout + done.stderr
    record = only_record(tmp_path)
    assert {row["op"] for row in record["checks"]} == {"token_choice"}
    assert {row["op"] for row in record["kernels"]} == {"token_choice"}


def test_a_task_that_crashes_fails_or_hangs_loses_nothing_but_itself(processes: ModuleType) -> None:
    rows: list[dict[str, Any]] = []
    tasks = [
        processes.Task(name, "victims", name, arguments, seconds)
        for name, arguments, seconds in (("crash", (), 60), ("fail", (), 60), ("hang", (), 3), ("counted", (3,), 60))
    ]
    errors = processes.run_apart(tasks, lambda section, row: rows.append(row), workers=2)
    assert set(errors) == {"crash", "fail", "hang"}
    assert "139" in errors["crash"]
    assert "ValueError: wrong" in errors["fail"]
    assert "stopped after 3 s" in errors["hang"]
    assert {row["i"] for row in rows} == {"before the crash", "before the error", "before the hang", 0, 1, 2}


def engine_row(case: str, batch: int, **more: Any) -> dict[str, Any]:
    return {"model": "llama-3-8b", "case": case, "batch": batch, "tokens_per_second": 1000.0 * batch, **more}


def kernel_row(op: str, case: str, ratio: float, bound: float = 100.0, **more: Any) -> dict[str, Any]:
    return {"op": op, "model": "llama-3-8b", "case": case, "ratio": ratio, "bound_microseconds": bound, **more}


@pytest.fixture
def fabricated(report: ModuleType) -> dict[str, Any]:
    """Not a measurement of anything."""
    record: dict[str, Any] = {
        "kind": "gpu",
        "complete": True,
        "errors": {},
        "environment": {
            "device": "Imaginary GPU",
            "date": "2000-01-01",
            "commit": "0000000",
            "versions": {"torch": "0", "triton": "0"},
        },
        "ceilings": {"copy_bytes_per_second": 2e12, "flops_per_second": 5e14},
        "checks": [{"ok": True}, {"ok": True}],
        "kernels": [
            kernel_row("paged_attention", "decode 64 x 8192", 0.9),
            kernel_row("paged_attention", "decode 8 x 8192", 0.85),
            # Too short to fill the device: shown, and no part of the goal.
            kernel_row("paged_attention", "decode 1 x 1024", 0.1, bound=1.4),
            kernel_row("paged_attention", "decode 64 x 8192 readout", 0.9, versus={"overhead": 0.04}),
            kernel_row("paged_attention", "prefill 2048", 0.3),
            kernel_row("sparse_mlp", "keep 0.5 x 1", 0.93),
            kernel_row("sparse_mlp", "keep 0.3 x 1", 0.5),
        ],
        "engine": [
            engine_row("unsteered", 1, ratio=0.8, replay_ratio=0.9),
            engine_row("all layers", 256, vs_ratio=0.99, vs_replay_ratio=0.995),
            engine_row("neuron clamps", 256, vs_ratio=0.98, vs_replay_ratio=0.99),
        ],
        "baselines": [engine_row("transformers, static cache", 1)],
        "readiness": [{"ok": True}],
    }
    record["summary"] = report.summary(record)
    return record


def test_the_summary_takes_the_worst_of_what_fills_the_device(fabricated: dict[str, Any]) -> None:
    summary = fabricated["summary"]
    assert summary["attention_decode_vs_bound"]["value"] == 0.85
    assert summary["attention_decode_vs_bound"]["met"]
    assert summary["attention_readout_overhead"]["value"] == 0.04
    assert not summary["attention_readout_overhead"]["met"]
    assert summary["sparse_mlp_vs_bound_keep50"]["value"] == 0.93
    assert summary["all_layer_steering_256"]["replay_values"] == [0.995]
    assert summary["neuron_clamps_overhead"]["value"] == pytest.approx(0.0204, abs=1e-4)
    assert summary["distinct_programs_256"]["value"] is None
    assert not summary["batch1_decode_vs_bound"]["met"]


def test_a_gpu_result_has_its_section_in_the_readme_by_what_it_says_it_is(
    fabricated: dict[str, Any], tmp_path: Path
) -> None:
    path = tmp_path / "imaginary-gpu-2000-01-01.json"
    path.write_text(json.dumps(fabricated))
    text = "\n".join(load("readme").section(path))
    assert "| Imaginary GPU, bfloat16, random weights | worst measured | goal |" in text
    assert "| attention at decode, of its bandwidth bound | 85.0 % | ≥ 80 % |" in text
    assert "| 256 programs, of one program | not measured | ≥ 97 % |" in text
    assert "| batch 256, all layers | 256,000 |" in text
    assert "2.00 TB/s and 500 TFLOP/s" in text


@pytest.mark.parametrize("change", [{"complete": False}, {"errors": {"engine": "broke"}}])
def test_a_gpu_run_that_is_not_whole_is_no_result(
    fabricated: dict[str, Any], tmp_path: Path, change: dict[str, Any]
) -> None:
    path = tmp_path / "imaginary-gpu-2000-01-01.json"
    path.write_text(json.dumps({**copy.deepcopy(fabricated), **change}))
    with pytest.raises(SystemExit, match="no whole run"):
        load("readme").section(path)


def test_a_result_of_an_unknown_kind_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "tpu.json"
    path.write_text("{}")
    with pytest.raises(SystemExit, match="no section"):
        load("readme").section(path)


def test_a_later_run_of_other_parts_keeps_what_was_measured_before(tmp_path: Path) -> None:
    first, second = tmp_path / "first", tmp_path / "second"
    given = ("--op", "rope", "--only")
    assert run_benchmark(first, *given, "kernels").returncode == 0
    (path,) = first.glob("*.json")
    done = run_benchmark(second, *given, "baselines", "--model", "tiny-llama", "--earlier", str(path))
    assert done.returncode == 0, done.stdout + done.stderr
    record = only_record(second)
    assert record["kernels"] == only_record(first)["kernels"]
    assert {row["op"] for row in record["cublas"]} == {"dense mlp"}
    assert not record["complete"]
