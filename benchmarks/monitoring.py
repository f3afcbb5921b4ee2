"""What watching costs: decode steps of the embedded model with 1,024 neurons and 64 directions watched, and without.

    python benchmarks/monitoring.py [--rounds 11] [--tokens 64]

Neurons are spread over all layers, directions over eight; every generated token is watched. Measured without a
reference, and against one, whose bins are counted besides those of Prometheus. Runs alternate; each ends with a scrape,
which is in its time. The overhead is that of the sum of all steps, each the least of its rounds.

Writes benchmarks/results/monitoring.json, and as its last line prints a JSON object.
"""

from patchclamp_server.threads import configure_threads

configure_threads()

import argparse
import json
import time
from collections.abc import Sequence
from statistics import fmean
from typing import Any

import torch
from measure import alternate_steps, decode_steps, save

from patchclamp_server.engine.engine import Engine
from patchclamp_server.interventions.program import Site, Vector
from patchclamp_server.model.info import ModelInfo
from patchclamp_server.model.load import load_model
from patchclamp_server.model.progress import RichProgress
from patchclamp_server.monitoring.bind import bind_watch
from patchclamp_server.monitoring.items import WatchedDirection, WatchedNeurons, WatchItem
from patchclamp_server.monitoring.reference import Recording, Reference
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
    recording.add(torch.randn(1024, len(watch), generator=torch.Generator().manual_seed(1)).numpy())
    return recording.result()


class Bench:
    def __init__(self, engine: Engine, prompts: Sequence[Sequence[int]], tokens: int) -> None:
        self.engine, self.prompts, self.tokens = engine, prompts, tokens
        self.watch = watch_of(engine.model.info)
        self.reference = some_reference(self.watch)

    def without(self) -> list[float]:
        return decode_steps(self.engine, self.prompts, None, self.tokens)

    def watched(self, reference: Reference | None = None) -> list[float]:
        monitor = self.engine.monitor
        monitor.start("", self.watch, WatchOptions(NAME, window_tokens=256), reference)
        try:
            seconds = decode_steps(self.engine, self.prompts, None, self.tokens)
            started = time.perf_counter()
            seen = monitor.statistics(NAME).rows
            seconds[-1] += time.perf_counter() - started
            assert seen == len(self.prompts) * (self.tokens - 1), seen
            return seconds
        finally:
            monitor.stop(NAME)

    def against_reference(self) -> list[float]:
        return self.watched(self.reference)


def measured(engine: Engine, batch: int, tokens: int, rounds: int) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(batch)
    prompts = torch.randint(100, engine.model.info.vocab_size, (batch, PROMPT), generator=generator).tolist()
    bench = Bench(engine, prompts, tokens)
    steps = alternate_steps(
        {"without": bench.without, "watched": bench.watched, "against_reference": bench.against_reference}, rounds
    )
    step = 1e3 * fmean(steps["without"])
    found: dict[str, Any] = {"step_milliseconds": round(step, 3)}
    for name in ("watched", "against_reference"):
        overhead = sum(steps[name]) / sum(steps["without"]) - 1
        found[name] = round(overhead, 4)
        print(f"batch {batch}, {name}: {overhead:+.2%} of a step of {step:.2f} ms", flush=True)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=11)
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
