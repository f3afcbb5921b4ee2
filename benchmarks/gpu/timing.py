"""Time of device work: CUDA graphs of many launches, replayed between events; on a CPU the same calls by the clock.

Variants that are compared are timed in turns, so that a noisy moment hits all alike. Launches rotate among the input
sets that they are given: with sets larger than the L2 together, no launch finds its inputs there.
"""

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from statistics import median

import torch

from gpu.setting import Setting

Run = Callable[[], object]


@dataclass(frozen=True)
class Timing:
    """Median seconds of one launch, and how far the 10th and 90th percentile are apart, relative to it."""

    seconds: float
    spread: float
    how: str


def timing_of(samples: Sequence[float], how: str) -> Timing:
    ordered = sorted(samples)
    middle = median(ordered)
    low, high = (ordered[round(q * (len(ordered) - 1))] for q in (0.1, 0.9))
    return Timing(middle, (high - low) / middle if middle else 0.0, how)


class Timer:
    def __init__(self, setting: Setting) -> None:
        self.setting = setting
        self.device = torch.device(setting.device)
        self.budget = setting.pick(0.25, 0.1, 0.0)
        self.cache_bytes = 2**20
        if setting.cuda:
            self.cache_bytes = torch.cuda.get_device_properties(self.device).L2_cache_size

    def n_sets(self, set_bytes: float, most: int = 48) -> int:
        """How many input sets of `set_bytes` are three times the L2, at most `most`; 2 where nothing is timed well."""
        if self.setting.tiny:
            return 2
        return max(1, min(most, math.ceil(3 * self.cache_bytes / max(set_bytes, 1))))

    def one(self, runs: Sequence[Run]) -> Timing:
        return self.together({"": runs})[""]

    def together(self, variants: Mapping[str, Sequence[Run]]) -> dict[str, Timing]:
        for runs in variants.values():
            for run in runs:
                run()
        if not self.setting.cuda:
            return {name: self._by_clock(runs) for name, runs in variants.items()}
        torch.cuda.synchronize()
        prepared = {name: self._prepared(runs) for name, runs in variants.items()}
        expected = sum(self._elapsed(replay) for replay, _, _ in prepared.values())
        rounds = max(7, min(200, math.ceil(self.budget * len(prepared) / max(expected, 1e-6))))
        marks: dict[str, list[tuple[torch.cuda.Event, torch.cuda.Event]]] = {name: [] for name in prepared}
        for _ in range(rounds):
            for name, (replay, _, _) in prepared.items():
                marks[name].append(_between_events(replay))
        torch.cuda.synchronize()
        timings = {}
        for name, (_, launches, how) in prepared.items():
            timings[name] = timing_of([a.elapsed_time(b) / 1e3 / launches for a, b in marks[name]], how)
        return timings

    def _prepared(self, runs: Sequence[Run]) -> tuple[Run, int, str]:
        """Many launches as one: enough of them that the gap before the first does not count."""

        def every() -> None:
            for run in runs:
                run()

        once = self._elapsed(every)
        cycles = max(1, min(math.ceil(40 / len(runs)), math.ceil(2e-3 / max(once, 1e-7))))

        def cycle() -> None:
            for _ in range(cycles):
                every()

        launches = cycles * len(runs)
        try:
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                cycle()
        except Exception as error:
            torch.cuda.synchronize()
            print(f"    not captured, launched one by one: {type(error).__name__}: {error}", flush=True)
            return cycle, launches, "launches"
        graph.replay()
        return graph.replay, launches, "graph"

    def _elapsed(self, run: Run) -> float:
        start, end = _between_events(run)
        torch.cuda.synchronize()
        return start.elapsed_time(end) / 1e3

    def _by_clock(self, runs: Sequence[Run]) -> Timing:
        samples = []
        for _ in range(3):
            for run in runs:
                started = time.perf_counter()
                run()
                samples.append(time.perf_counter() - started)
        return timing_of(samples, "host")


def _between_events(run: Run) -> tuple[torch.cuda.Event, torch.cuda.Event]:
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    run()
    end.record()
    return start, end


def bounded(setting: Setting, timing: Timing, *, byte_count: float = 0.0, flops: float = 0.0) -> dict[str, object]:
    """A timing beside the least time that its bytes and its operations take on this device."""
    by_bytes = byte_count / setting.copy_bytes_per_second
    by_flops = flops / setting.flops_per_second
    bound = max(by_bytes, by_flops)
    return {
        "microseconds": round(timing.seconds * 1e6, 3),
        "spread": round(timing.spread, 4),
        "how": timing.how,
        "bytes": int(byte_count),
        "flops": int(flops),
        "bound_microseconds": round(bound * 1e6, 3),
        "bound_by": "bytes" if by_bytes >= by_flops else "flops",
        "ratio": round(bound / timing.seconds, 4),
    }
