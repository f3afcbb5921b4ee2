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
from typing import Any

from patchclamp_server.engine.engine import Engine
from patchclamp_server.engine.request import Event, Failed, Finished, Request, StopParams, Token
from patchclamp_server.interventions.bound import BoundProgram

RESULTS = Path(__file__).parent / "results"


def run_requests(
    engine: Engine, prompts: Sequence[Sequence[int]], programs: Sequence[BoundProgram | None], tokens: int
) -> float:
    """Seconds from the first submission to the last token of all requests, each of `tokens` tokens, run together."""
    left = threading.Semaphore(0)
    failures: list[str] = []

    def on_event(event: Event) -> None:
        if isinstance(event, Failed):
            failures.append(str(event.error))
        if isinstance(event, Failed | Finished):
            left.release()

    stop = StopParams(max_tokens=tokens, ignore_eos=True)
    started = time.perf_counter()
    for prompt, program in zip(prompts, programs, strict=True):
        engine.submit(Request(tuple(prompt), on_event, program=program, stop=stop))
    for _ in prompts:
        left.acquire()
    if failures:
        raise RuntimeError(failures[0])
    return time.perf_counter() - started


def alternate(runs: dict[str, Callable[[], float]], rounds: int) -> dict[str, list[float]]:
    """Runs each in turn, back and forth, `rounds` times after one unmeasured round: a noisy moment, and a machine that
    gets slower, hit all alike."""
    figures: dict[str, list[float]] = {name: [] for name in runs}
    for i in range(rounds + 1):
        for name, run in runs.items() if i % 2 else reversed(runs.items()):
            seconds = run()
            if i:
                figures[name].append(seconds)
    return figures


def decode_steps(
    engine: Engine, prompts: Sequence[Sequence[int]], program: BoundProgram | None, tokens: int
) -> list[float]:
    """Seconds of each decode step of all requests together: between the tokens of the one that was submitted last."""
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
    for prompt, own in zip(prompts, times, strict=True):
        engine.submit(Request(tuple(prompt), follower(own), program=program, stop=stop))
    for _ in prompts:
        left.acquire()
    if failures:
        raise RuntimeError(failures[0])
    return [after - before for before, after in pairwise(times[-1])]


def alternate_steps(runs: dict[str, Callable[[], list[float]]], rounds: int) -> dict[str, list[float]]:
    """Seconds of each step: the least of `rounds` runs, which take turns, back and forth, after one unmeasured.

    What else the machine does only adds to a step, by more than what is compared here; the least has the least of it.
    """
    steps: dict[str, list[list[float]]] = {name: [] for name in runs}
    for i in range(rounds + 1):
        for name, run in runs.items() if i % 2 else reversed(runs.items()):
            seconds = run()
            if i:
                steps[name].append(seconds)
    return {name: [min(same) for same in zip(*found, strict=True)] for name, found in steps.items()}


def rates(figures: dict[str, list[float]], tokens: dict[str, int]) -> dict[str, float]:
    """Median tokens per second."""
    return {name: tokens[name] / median(seconds) for name, seconds in figures.items()}


def save(name: str, payload: dict[str, Any]) -> Path:
    """Writes benchmarks/results/<name>.json with machine, versions and commit."""
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, cwd=RESULTS)
    record = {
        "date": datetime.now(UTC).strftime("%Y-%m-%d"),
        "commit": commit.stdout.strip() or "unknown",
        "machine": f"{platform.machine()}, {_processor()}",
        "versions": {package: version(package) for package in ("torch", "transformers", "numba")},
        **payload,
    }
    path = RESULTS / f"{name}.json"
    path.write_text(json.dumps(record, indent=2) + "\n")
    return path


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    names = [line.split(":")[1].strip() for line in info.read_text().splitlines() if line.startswith("model name")]
    return f"{len(names)} x {names[0]}" if names else platform.processor()
