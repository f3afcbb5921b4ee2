"""Kernels and engine on one GPU: right against float64, then timed against what its memory and matrix units allow.

    python benchmarks/gpu.py [--output DIR] [--quick] [--only kernels engine baselines] [--model llama qwen]

1. the device, and its two ceilings: copy bandwidth and bfloat16 matrix rate;
2. every kernel against its reference in float64, outputs poisoned before;
3. every kernel timed at Llama-3-8B and Qwen3-1.7B shapes, beside the time that its bytes or operations take at least;
4. the engine with random weights of both shapes: decode unsteered and steered, prefill, and where a step's time goes;
5. `generate` of transformers with a static cache on the same shapes.

No gRPC, no network, nothing installed but torch, triton and transformers. Prints as it goes, writes
<output>/<device>-<date>.json after every part, prints a summary last and as its last line that summary as JSON. Exit
status 1 when a check failed, when a kernel was compiled after the engine said that it was ready, or when a part broke.
On a CPU, `--device cpu --tiny` runs the same code on small shapes and the references, which shows that it runs.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

import argparse
import json
import os
import tempfile
import time
from dataclasses import replace

from gpu.bootstrap import bootstrap

bootstrap()

from gpu.processes import Task, run_apart, run_inline
from gpu.report import SECTIONS, Report, final_table
from gpu.setting import Setting

RESULTS = Path(__file__).parent / "results"
PARTS = ("kernels", "engine", "baselines")
# Modules of benchmarks/gpu/ with `checks` and `timings`; those that goals are about come first.
OPS = ("attention", "residual", "neurons", "sparse", "rope", "features", "probes", "lens", "tokens")
MOST_SECONDS = 530.0


def main() -> int:
    arguments = _arguments()
    setting = Setting(
        device=arguments.device,
        tiny=arguments.tiny,
        quick=arguments.quick,
        models=tuple(arguments.model),
        deadline=time.time() + arguments.seconds,
        commit=arguments.commit,
    )
    apart = setting.cuda if arguments.processes is None else arguments.processes > 0
    workers = arguments.processes or min(8, os.cpu_count() or 1)
    options = {key: str(value) for key, value in vars(arguments).items()}
    earlier = json.loads(arguments.earlier.read_text(encoding="utf-8")) if arguments.earlier else None
    report = Report(arguments.output or _output(setting.tiny), options, earlier)
    for section in (s for part in arguments.only for s in SECTIONS[part]):
        report.record.pop(section, None)

    def run(title: str, tasks: list[Task], *, workers: int = 1, fresh: bool = False) -> None:
        print(f"== {title}, {setting.seconds_left:.0f} s left", flush=True)
        if setting.seconds_left < 5:
            report.fail({title: "left out: the time is up"})
            return
        errors = run_apart(tasks, report.add, workers=workers, fresh=fresh) if apart else run_inline(tasks, report.add)
        report.fail(errors)
        report.write()

    def task(part: str, module: str, function: str, *more: object, seconds: float = 240.0) -> Task:
        seconds = min(seconds, max(setting.seconds_left + 20.0, 10.0))
        name = " ".join((part, module, *map(str, more)))
        return Task(name, f"gpu.{module}", function, (setting, *more), seconds)

    run("device and ceilings", [task("ceilings", "ceilings", "ceilings")])
    measured = report.record.get("ceilings")
    if measured is None:
        print(final_table(report.record))
        return 1
    _check_same(report.record["environment"], earlier)
    setting = replace(
        setting,
        copy_bytes_per_second=measured["copy_bytes_per_second"],
        flops_per_second=measured["flops_per_second"],
    )
    ops = [op for op in OPS if not arguments.op or op in arguments.op]
    if "kernels" in arguments.only:
        run("kernels against their references", [task("checks", op, "checks") for op in ops], workers=workers)
        broken = {name.split()[1] for name in report.record["errors"] if name.startswith("checks")}
        sound = [op for op in ops if op not in broken]
        run("kernels against their bounds", [task("timings", op, "timings", seconds=120.0) for op in sound])
    shapes = setting.shapes
    if "engine" in arguments.only:
        run("engine", [task("engine", "engine", "measure", s.name) for s in shapes], fresh=True)
    if "baselines" in arguments.only:
        run("baselines", [task("baselines", "baselines", "measure", s.name) for s in shapes], fresh=True)
    path = report.write(complete=True)
    print(f"== written: {path.name}")
    print(final_table(report.record), flush=True)
    print(json.dumps(report.record["summary"]), flush=True)
    return 0 if report.passed else 1


def _check_same(environment: dict[str, object], earlier: dict[str, dict[str, object]] | None) -> None:
    for key in ("device", "commit") if earlier else ():
        if environment[key] != earlier["environment"][key]:
            raise SystemExit(f"the earlier run has {key} {earlier['environment'][key]}, this one {environment[key]}")


def _output(tiny: bool) -> Path:
    """Numbers of small shapes are no result."""
    return Path(tempfile.mkdtemp()) if tiny else RESULTS


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Kernels and engine on one GPU.")
    parser.add_argument("--output", type=Path, help="default: benchmarks/results")
    parser.add_argument("--quick", action="store_true", help="fewer cases and rounds, about two minutes")
    parser.add_argument("--only", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--model", nargs="+", default=[], help="beginnings of names of shapes")
    parser.add_argument("--op", nargs="+", choices=OPS, default=[], help="of the kernels, these modules")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--tiny", action="store_true", help="small shapes, to see that everything runs")
    parser.add_argument("--seconds", type=float, default=MOST_SECONDS, help="what has not begun by then is left out")
    parser.add_argument("--processes", type=int, help="for checks; 0 runs all in this process; default: 8 on CUDA")
    parser.add_argument("--commit", default="", help="where the machine has the files without their history")
    parser.add_argument("--earlier", type=Path, help="a record of this device and commit: parts not run stay as there")
    arguments = parser.parse_args()
    import torch

    if arguments.device.startswith("cuda") and not torch.cuda.is_available():
        parser.error("this machine has no CUDA device; --device cpu --tiny shows that the script runs")
    return arguments


if __name__ == "__main__":
    sys.exit(main())
