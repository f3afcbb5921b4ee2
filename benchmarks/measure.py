"""What the benchmarks share: requests to an engine in this process, alternating runs, and result files."""

import json
import platform
import subprocess
import threading
import time
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from importlib.metadata import version
from itertools import pairwise
from pathlib import Path
from statistics import median
from typing import Any, TypeVar

from measured_code import code_digest

from patchclamp_server.engine.engine import Engine
from patchclamp_server.engine.request import Event, Failed, Finished, Request, SparseInference, StopParams, Token
from patchclamp_server.interventions.bound import BoundProgram

Figure = TypeVar("Figure")
RESULTS = Path(__file__).parent / "results"


def run_requests(
    engine: Engine, prompts: Sequence[Sequence[int]], programs: Sequence[BoundProgram | None], tokens: int
) -> float:
    """Seconds from the first submission to the last token of all requests, each of `tokens` tokens, run together."""
    started = time.perf_counter()
    _run_together(engine, prompts, programs, tokens)
    return time.perf_counter() - started


def decode_steps(
    engine: Engine,
    prompts: Sequence[Sequence[int]],
    program: BoundProgram | None,
    tokens: int,
    sparsity: SparseInference | None = None,
) -> list[float]:
    """Seconds of each decode step of all requests together: between the tokens of the one that was submitted last."""
    times = _run_together(engine, prompts, [program] * len(prompts), tokens, sparsity)
    return [after - before for before, after in pairwise(times[-1])]


def _run_together(
    engine: Engine,
    prompts: Sequence[Sequence[int]],
    programs: Sequence[BoundProgram | None],
    tokens: int,
    sparsity: SparseInference | None = None,
) -> list[list[float]]:
    """When each token of each request came, by time.perf_counter()."""
    left = threading.Semaphore(0)
    times: list[list[float]] = [[] for _ in prompts]
    failures: list[str] = []

    def follower(own: list[float]) -> Callable[[Event], None]:
        def on_event(event: Event) -> None:
            if isinstance(event, Token):
                own.append(time.perf_counter())
            elif isinstance(event, Failed):
                failures.append(str(event.error))
            if isinstance(event, Failed | Finished):
                left.release()

        return on_event

    stop = StopParams(max_tokens=tokens, ignore_eos=True)
    for prompt, program, own in zip(prompts, programs, times, strict=True):
        engine.submit(Request(tuple(prompt), follower(own), program=program, stop=stop, sparsity=sparsity))
    for _ in prompts:
        left.acquire()
    if failures:
        raise RuntimeError(failures[0])
    return times


def alternate(runs: dict[str, Callable[[], Figure]], rounds: int) -> dict[str, list[Figure]]:
    """Runs each in turn, back and forth, `rounds` times after one unmeasured round: a noisy moment, and a machine that
    gets slower, hit all alike."""
    figures: dict[str, list[Figure]] = {name: [] for name in runs}
    for i in range(rounds + 1):
        for name, run in runs.items() if i % 2 else reversed(runs.items()):
            figure = run()
            if i:
                figures[name].append(figure)
    return figures


def least_steps(rounds: Sequence[Sequence[float]]) -> list[float]:
    """Seconds of each step: the least of the rounds. What else the machine does only adds to a step."""
    return [min(same) for same in zip(*rounds, strict=True)]


def rates(figures: dict[str, list[float]], tokens: dict[str, int]) -> dict[str, float]:
    """Median tokens per second."""
    return {name: tokens[name] / median(seconds) for name, seconds in figures.items()}


def record(name: str, payload: dict[str, Any]) -> dict[str, Any]:
    """A result of this kind with machine, versions, commit, and the digest of the code it measures."""
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, cwd=RESULTS)
    return {
        "date": datetime.now(UTC).strftime("%Y-%m-%d"),
        "commit": commit.stdout.strip() or "unknown",
        "code": code_digest(name),
        "machine": f"{platform.machine()}, {_processor()}",
        "versions": {package: version(package) for package in ("torch", "transformers", "numba")},
        **payload,
    }


def save(name: str, payload: dict[str, Any]) -> Path:
    """Writes benchmarks/results/<name>.json."""
    path = RESULTS / f"{name}.json"
    path.write_text(json.dumps(record(name, payload), indent=2) + "\n")
    return path


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    names = [line.split(":")[1].strip() for line in info.read_text().splitlines() if line.startswith("model name")]
    return f"{len(names)} x {names[0]}" if names else platform.processor()
