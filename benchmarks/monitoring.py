"""What watching costs: decode steps of the embedded model with 1,024 neurons and 64 directions watched, and without.

    python benchmarks/monitoring.py [--rounds 16] [--tokens 64]

Neurons are spread over all layers, directions over eight; every generated token is watched. Measured without a
reference, and against one, whose bins are counted besides those of Prometheus. Every other step of a run is watched,
and compared with its neighbours; counting, which is done for many rows at once, is timed by itself.

Writes benchmarks/results/monitoring.json, and as its last line prints a JSON object.
"""

from patchclamp_server.cpu.compiled_code import keep_compiled_code
from patchclamp_server.threads import configure_threads

configure_threads()
keep_compiled_code()

import argparse
import json
import time
from collections.abc import Sequence
from statistics import fmean, median
from typing import Any

import torch
from measure import decode_steps, save

from patchclamp_server.engine.engine import Engine
from patchclamp_server.engine.runner import StepResult
from patchclamp_server.engine.scheduler import Work
from patchclamp_server.interventions.program import Vector
from patchclamp_server.model.info import ModelInfo
from patchclamp_server.model.load import load_model
from patchclamp_server.model.progress import RichProgress
from patchclamp_server.model.sites import Site
from patchclamp_server.monitoring.bind import bind_watch
from patchclamp_server.monitoring.items import WatchedDirection, WatchedNeurons, WatchItem
from patchclamp_server.monitoring.reference import Recording, Reference
from patchclamp_server.monitoring.running import Call
from patchclamp_server.monitoring.watch import Watch, WatchOptions

NEURONS, DIRECTIONS, DIRECTION_LAYERS = 1024, 64, 8
# Sequences of a decode step, each with a prompt of so many tokens.
BATCHES = (1, 8)
PROMPT = 128
NAME = "benchmark"


def watch_of(info: ModelInfo) -> Watch:
    generator = torch.Generator().manual_seed(0)
    chosen = torch.randperm(info.n_layers * info.d_ff, generator=generator)[:NEURONS].sort().values.tolist()
    items = []
    for layer in range(info.n_layers):
        neurons = tuple(place % info.d_ff for place in chosen if place // info.d_ff == layer)
        if neurons:
            items.append(WatchItem(f"layer {layer}", WatchedNeurons(layer, neurons)))
    layers = tuple(range(0, info.n_layers, info.n_layers // DIRECTION_LAYERS))[:DIRECTION_LAYERS]
    for i in range(DIRECTIONS // len(layers)):
        vector = Vector(values=torch.randn(info.d_model, generator=generator), unit=True)
        items.append(WatchItem(f"direction {i}", WatchedDirection(vector, Site.RESID_POST, layers)))
    watch = bind_watch(items, info, None, max_items=NEURONS + DIRECTIONS)
    assert len(watch) == NEURONS + DIRECTIONS
    return watch


def some_reference(watch: Watch) -> Reference:
    """Of normal numbers: what the bins are costs nothing."""
    recording = Recording(len(watch), 1024, lambda seen, total: None, lambda reference: None)
    generator = torch.Generator().manual_seed(1)
    values, norms = (torch.randn(1024, n, generator=generator) for n in (len(watch), len(watch.places)))
    recording.add(values.numpy(), 1000.0 + norms.numpy())
    recording.find_outliers(watch.place_of)
    return recording.result()


class Bench:
    def __init__(self, engine: Engine, prompts: Sequence[Sequence[int]], tokens: int) -> None:
        self.engine, self.prompts, self.tokens = engine, prompts, tokens
        self.watch = watch_of(engine.model.info)
        self.reference = some_reference(self.watch)

    def overhead(self, rounds: int, reference: Reference | None = None) -> tuple[float, float]:
        """Seconds of an unwatched step, and what watching adds to one: the mean of the middle half of the differences
        from the steps before and after, and the share of a step in what counting took."""
        unwatched: list[float] = []
        added: list[float] = []
        self.engine.monitor.start("", self.watch, WatchOptions(NAME, window_tokens=256), reference)
        with EveryOther(self.engine) as steps:
            for first in range(rounds):
                steps.count = first
                seconds = decode_steps(self.engine, self.prompts, None, self.tokens)
                for i in range(1, len(seconds) - 1):
                    difference = seconds[i] - (seconds[i - 1] + seconds[i + 1]) / 2
                    if steps.is_watched(i - len(seconds)):
                        added.append(difference)
                    else:
                        added.append(-difference)
                        unwatched.append(seconds[i])
        self.engine.monitor.stop(NAME)
        added.sort()
        quarter = len(added) // 4
        return median(unwatched), fmean(added[quarter:-quarter]) + steps.counting / steps.watched


class EveryOther:
    """Hides the watches from every other step: neighbours in one run differ in nothing else, whatever the machine does
    meanwhile."""

    def __init__(self, engine: Engine) -> None:
        self._runner, self._run = engine.runner, engine.runner.run
        self._monitor, self._count = engine.monitor, engine.monitor._count
        # Steps, those of them that were watched, and seconds of counting.
        self.count = self.watched = 0
        self.counting = 0.0

    def __enter__(self) -> "EveryOther":
        self._runner.run = self._every_other  # type: ignore[method-assign]
        self._monitor._count = self._timed  # type: ignore[method-assign]
        return self

    def __exit__(self, *exception: object) -> None:
        del self._runner.run, self._monitor._count  # type: ignore[method-assign]

    def _every_other(self, work: list[Work]) -> StepResult:
        self.count += 1
        if self.count % 2:
            self.watched += 1
            return self._run(work)
        current, self._monitor._current = self._monitor._current, None
        try:
            return self._run(work)
        finally:
            self._monitor._current = current

    def _timed(self) -> list[Call]:
        started = time.perf_counter()
        calls = self._count()
        self.counting += time.perf_counter() - started
        return calls

    def is_watched(self, step: int) -> bool:
        """Of a run that has ended: `step` is counted from its end, -1 for the last."""
        return (self.count + 1 + step) % 2 == 1


def measured(engine: Engine, batch: int, tokens: int, rounds: int) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(batch)
    prompts = torch.randint(100, engine.model.info.vocab_size, (batch, PROMPT), generator=generator).tolist()
    bench = Bench(engine, prompts, tokens)
    decode_steps(engine, prompts, None, tokens)
    found: dict[str, Any] = {}
    for name, reference in (("watched", None), ("against_reference", bench.reference)):
        step, added = bench.overhead(rounds, reference)
        found[name] = round(added / step, 4)
        found[f"{name}_milliseconds"] = [round(1e3 * seconds, 3) for seconds in (step, added)]
        print(f"batch {batch}, {name}: {added / step:+.2%} of a step of {1e3 * step:.2f} ms", flush=True)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=16)
    parser.add_argument("--tokens", type=int, default=64)
    options = parser.parse_args()
    with RichProgress() as progress:
        model = load_model(progress=progress)
    engine = Engine(model)
    engine.start()
    found = {str(batch): measured(engine, batch, options.tokens, options.rounds) for batch in BATCHES}
    engine.shutdown()
    last = {
        "watch_overhead": max(row[name] for row in found.values() for name in ("watched", "against_reference")),
        **{f"watch_overhead_batch_{batch}": row["watched"] for batch, row in found.items()},
    }
    if vars(options) == vars(parser.parse_args([])):
        save(
            "monitoring",
            {
                "threads": torch.get_num_threads(),
                "neurons": NEURONS,
                "directions": DIRECTIONS,
                "batches": found,
                **last,
            },
        )
    print(json.dumps(last))


if __name__ == "__main__":
    main()
