"""The offline tuner: times every candidate configuration of every op on this GPU and writes the table of its class.

    python -m patchclamp_kernels.tune [--op NAME …] [--output tables/h100.json]

Ops that are not named keep what the file says of them. Serving only ever reads the table (configs.py).
"""

import argparse
import math
import multiprocessing
import os
import statistics
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass, fields, is_dataclass
from pathlib import Path

import torch
from torch import Tensor
from triton.errors import TritonError

from patchclamp_kernels import configs, ops
from patchclamp_kernels.cases import TuningCase
from patchclamp_kernels.configs import Config

WARM_UP = 3
REPEATS = 30

# Milliseconds that one call takes on the device.
Timer = Callable[[Callable[[], object]], float]
Table = dict[str, dict[str, Config]]


@dataclass(frozen=True)
class Trial:
    """One candidate of a case: its time, or why it was rejected."""

    config: Config
    milliseconds: float = math.inf
    rejected: str = ""


class CudaTimer:
    """Takes the median over runs with CUDA events; before each, the L2 cache is filled with something else."""

    def __init__(self, device: torch.device) -> None:
        cache_bytes = torch.cuda.get_device_properties(device).L2_cache_size
        # Writing it also keeps the device busy while the launch of the op is on its way.
        self._flush = torch.empty(max(4 * cache_bytes, 1 << 28), dtype=torch.uint8, device=device)

    def __call__(self, run: Callable[[], object]) -> float:
        for _ in range(WARM_UP):
            run()
        events = [(torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)) for _ in range(REPEATS)]
        for start, end in events:
            self._flush.zero_()
            start.record()
            run()
            end.record()
        torch.cuda.synchronize()
        milliseconds: list[float] = [start.elapsed_time(end) for start, end in events]
        return statistics.median(milliseconds)


def try_candidates(case: TuningCase, timer: Timer) -> list[Trial]:
    """Makes one trial for each candidate, in order. What does not compile, does not fit on the device or does not
    compute finite numbers is rejected; any other error is a bug of the op and is raised."""
    return [_try(case, config, timer) for config in case.candidates]


def _try(case: TuningCase, config: Config, timer: Timer) -> Trial:
    try:
        result = case.run(config)
    except TritonError as error:
        return Trial(config, rejected=f"{type(error).__name__}: {str(error).strip()}")
    if not all(bool(torch.isfinite(x).all()) for x in _tensors(result) if x.is_floating_point()):
        return Trial(config, rejected="the result is not finite")
    return Trial(config, timer(lambda: case.run(config)))


def _tensors(result: object) -> Iterator[Tensor]:
    """Yields the tensors in whatever an op returns."""
    if isinstance(result, Tensor):
        yield result
    elif isinstance(result, tuple | list):
        for part in result:
            yield from _tensors(part)
    elif is_dataclass(result):
        for field in fields(result):
            yield from _tensors(getattr(result, field.name))


def fastest(trials: Iterable[Trial]) -> Trial | None:
    """Returns the fastest trial, the earlier of two that are as fast; None when every candidate was rejected."""
    runnable = [trial for trial in trials if not trial.rejected]
    return min(runnable, key=lambda trial: trial.milliseconds, default=None)


def compile_all(op: str, processes: int) -> None:
    """Runs every candidate once, distributed over processes: each takes a second to compile, and Triton caches it."""
    with multiprocessing.get_context("spawn").Pool(processes) as pool:
        pool.starmap(_run_share, [(op, rank, processes) for rank in range(processes)], chunksize=1)


def _run_share(op: str, rank: int, processes: int) -> None:
    every = [(case, config) for case in ops.tuning_cases(torch.device("cuda"), [op]) for config in case.candidates]
    for case, config in every[rank::processes]:
        with suppress(TritonError):  # it is rejected again, and said to be, when its time is taken
            case.run(config)
    torch.cuda.synchronize()


def check_known(table: Table, cases: Iterable[TuningCase]) -> None:
    """Raises ValueError for an entry that no tuning case stands for, because no wrapper would ever look it up."""
    known = {(case.op, case.bucket) for case in cases}
    strangers = [f"{op}/{bucket}" for op, buckets in table.items() for bucket in buckets if (op, bucket) not in known]
    if strangers:
        raise ValueError(f"the table has buckets that no op knows: {', '.join(strangers)}")


def tune(cases: Iterable[TuningCase], timer: Timer) -> Table:
    """Returns the fastest configuration by op and bucket. A case without any is left out: the op's default stays."""
    table: Table = {}
    for case in cases:
        trials = try_candidates(case, timer)
        best = fastest(trials)
        for trial in trials:
            verdict = trial.rejected or f"{trial.milliseconds * 1000:.1f} µs"
            print(f"{'*' if trial is best else ' '} {case.op} {case.bucket} {trial.config}: {verdict}")
        if best is None:
            print(f"  {case.op} {case.bucket}: no candidate runs, the default stays")
        else:
            table.setdefault(case.op, {})[case.bucket] = best.config
    return table


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m patchclamp_kernels.tune")
    parser.add_argument("--op", nargs="+", choices=list(ops.OPS), default=list(ops.OPS))
    parser.add_argument("--output", type=Path, help="default: tables/<class of this GPU>.json in the package")
    parser.add_argument("--processes", type=int, default=os.cpu_count(), help="that compile candidates beforehand")
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        parser.error("tuning times kernels on a GPU, and this machine has no CUDA device")
    device = torch.device("cuda", torch.cuda.current_device())
    output = arguments.output or _table_file(parser, device)
    table = configs.load(output.read_text()) if output.is_file() else {}
    # On the meta device no memory is taken: only names are asked for.
    check_known(table, ops.tuning_cases(torch.device("meta")))
    timer = CudaTimer(device)
    for name in arguments.op:
        compile_all(name, arguments.processes)
        table.update(tune(ops.tuning_cases(device, [name]), timer))
    output.parent.mkdir(parents=True, exist_ok=True)
    output.write_text(configs.dump(table))
    print(f"wrote {output}")
    return 0


def _table_file(parser: argparse.ArgumentParser, device: torch.device) -> Path:
    name = configs.gpu_class(device.index)
    if not name:
        device_name = torch.cuda.get_device_name(device)
        parser.error(f"no table is kept for {device_name!r} (configs.GPU_CLASSES): say --output")
    return Path(__file__).parent / "tables" / f"{name}.json"


if __name__ == "__main__":
    sys.exit(main())
