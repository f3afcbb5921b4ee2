"""Kernels and engine on one GPU: right against float64, then timed against what its memory and matrix units allow.

    python benchmarks/gpu [--output DIR] [--quick] [--only kernels engine baselines] [--model llama qwen]

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

sys.path.insert(0, str(Path(__file__).parents[1]))

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

RESULTS = Path(__file__).parents[1] / "results"
PARTS = ("kernels", "engine", "baselines")
# Modules of benchmarks/gpu/ with `checks` and `timings`; those that goals are about come first.
OPS = ("attention", "residual", "neurons", "sparse", "rope", "features", "probes", "lens", "tokens")
MOST_SECONDS = 530.0


class Benchmark:
    def __init__(self, arguments: argparse.Namespace) -> None:
        self.parts = arguments.only
        self.ops = [op for op in OPS if not arguments.op or op in arguments.op]
        self.setting = Setting(
            device=arguments.device,
            tiny=arguments.tiny,
            quick=arguments.quick,
            models=tuple(arguments.model),
            deadline=time.time() + arguments.seconds,
            commit=arguments.commit,
            seed=arguments.seed,
        )
        self.partial = bool(arguments.quick or arguments.model or arguments.op)
        self.apart = self.setting.cuda if arguments.processes is None else arguments.processes > 0
        self.workers = arguments.processes or min(12, os.cpu_count() or 1)
        self.earlier = json.loads(arguments.earlier.read_text(encoding="utf-8")) if arguments.earlier else {}
        options = {key: str(value) for key, value in vars(arguments).items()}
        output = arguments.output or (Path(tempfile.mkdtemp()) if arguments.tiny else RESULTS)
        self.report = Report(output, options, self.earlier, self.parts)

    def run(self) -> None:
        self._run("device and ceilings", [self._task("ceilings", "ceilings", "ceilings")])
        if "ceilings" not in self.report.record:
            return
        self._check_earlier()
        measured = self.report.record["ceilings"]
        self.setting = replace(
            self.setting,
            copy_bytes_per_second=measured["copy_bytes_per_second"],
            flops_per_second=measured["flops_per_second"],
        )
        shapes = [shape.name for shape in self.setting.shapes]
        if "kernels" in self.parts:
            checks = [self._task("checks", op, "checks", model=name) for op in self.ops for name in shapes]
            self._run("kernels against their references", checks, workers=self.workers)
            # An op that broke down would take the others with it.
            broken = {name.split()[1] for name in self.report.record["errors"] if name.startswith("checks")}
            timings = [self._task("timings", op, "timings", seconds=120.0) for op in self.ops if op not in broken]
            self._run("kernels against their bounds", timings)
        for part in ("engine", "baselines"):
            if part in self.parts:
                self._run(part, [self._task(part, part, "measure", model=name) for name in shapes], fresh=True)

    def _task(self, part: str, module: str, function: str, *, model: str = "", seconds: float = 240.0) -> Task:
        setting = replace(self.setting, models=(model,)) if model else self.setting
        seconds = min(seconds, max(setting.seconds_left + 20.0, 10.0))
        return Task(f"{part} {module} {model}".strip(), f"gpu.{module}", function, (setting,), seconds)

    def _run(self, title: str, tasks: list[Task], *, workers: int = 1, fresh: bool = False) -> None:
        print(f"== {title}, {self.setting.seconds_left:.0f} s left", flush=True)
        report = self.report
        if self.setting.seconds_left < 5:
            report.fail({f"{tasks[0].name.split()[0]}: {title}": "left out: the time is up"})
        elif self.apart:
            report.fail(run_apart(tasks, report.add, workers=workers, fresh=fresh))
        else:
            report.fail(run_inline(tasks, report.add))
        report.write()

    def _check_earlier(self) -> None:
        environment = self.report.record["environment"]
        for key in ("device", "commit") if self.earlier else ():
            if environment[key] != self.earlier["environment"][key]:
                theirs = self.earlier["environment"][key]
                raise SystemExit(f"the earlier run has {key} {theirs}, this one {environment[key]}")

    @property
    def complete(self) -> bool:
        return not self.partial and all(section in self.report.record for part in PARTS for section in SECTIONS[part])


def main() -> int:
    benchmark = Benchmark(_arguments())
    benchmark.run()
    report = benchmark.report
    path = report.write(complete=benchmark.complete)
    print(f"== written: {path.name}")
    print(final_table(report.record), flush=True)
    print(json.dumps(report.record["summary"]), flush=True)
    return 0 if report.passed else 1


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
    parser.add_argument("--processes", type=int, help="for checks; 0 runs all in this process; default: 12 on CUDA")
    parser.add_argument("--commit", default="", help="where the machine has the files without their history")
    parser.add_argument("--earlier", type=Path, help="a record of this device and commit: parts not run stay as there")
    parser.add_argument("--seed", type=int, help="of the inputs of the checks; default: 0 if --tiny, else a new one")
    arguments = parser.parse_args()
    if arguments.seed is None:
        arguments.seed = 0 if arguments.tiny else int(time.time())
    if not arguments.device.startswith("cuda") and not arguments.tiny:
        parser.error("without a GPU there is only --tiny")
    import torch

    if arguments.device.startswith("cuda") and not torch.cuda.is_available():
        parser.error("this machine has no CUDA device; --device cpu --tiny shows that the script runs")
    return arguments


if __name__ == "__main__":
    sys.exit(main())
