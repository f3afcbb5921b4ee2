"""Where the time of a decode step goes: stages of the compiled blocks by the processor's clock, and all that is beside.

    python benchmarks/step.py [--model MODEL] [--batches 1 16 64] [--context 128] [--steps 48]

Every stage of a step notes when its first chunk begins and when its last one ends (model/compiled/stages.py), so that
nothing is measured but what runs anyway. A row is a kind of stage: its calls in a step, and milliseconds of them.
Between stages threads wait for each other; beside the blocks are embedding, final norm, unembedding, sampling and the
engine. Milliseconds are means over the half of the steps that took least: what else a machine does only adds.
Writes benchmarks/results/step.json, and prints a JSON object as its last line.
"""

from patchclamp_server.cpu.compiled_code import keep_compiled_code
from patchclamp_server.threads import configure_threads

configure_threads()
keep_compiled_code()

import argparse
import json
import sys
import time
from collections import Counter, defaultdict
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from measure import run_requests, save
from numpy.typing import NDArray

from patchclamp_server.engine.config import EngineConfig
from patchclamp_server.engine.engine import Engine
from patchclamp_server.model.compiled.job import Stage
from patchclamp_server.model.load import load_model

Ints = NDArray[np.int64]
BETWEEN, BESIDE = "between stages", "beside the blocks"
# Entries of a stage's counters (model/compiled/job.py).
BEGIN, END = 6, 7
# The step that a prompt ends with, and those in which the last requests still join, are not counted.
SETTLING = 4


class Recorded:
    """The longest run of decode steps of `rows` rows, each with the time when its blocks were through. Steps with
    prompts beside come before."""

    def __init__(self, rows: int) -> None:
        self._rows = rows
        self._run: list[tuple[float, Ints, Ints]] = []
        self.steps: list[tuple[float, Ints, Ints]] = []

    def __call__(self, rows: int, stages: Ints, counters: Ints) -> None:
        if rows != self._rows:
            self._run = []
            return
        self._run.append((time.perf_counter(), stages, counters))
        if len(self._run) > len(self.steps):
            self.steps = self._run


def milliseconds(steps: list[tuple[float, Ints, Ints]]) -> dict[str, Any]:
    """Returns the milliseconds of a step by what they are spent on, and the calls of each stage."""
    steps = steps[SETTLING:]
    (first_time, _, first), (last_time, _, last) = steps[0], steps[-1]
    per_cycle = 1e3 * (last_time - first_time) / (int(last[-1, END]) - int(first[-1, END]))
    rows = []
    for (before, _, _), (at, stages, counters) in pairwise(steps):
        spent: dict[str, float] = defaultdict(float)
        own = (counters[:, END] - counters[:, BEGIN]) * per_cycle
        for stage, duration in zip(stages[:, 0].tolist(), own.tolist(), strict=True):
            spent[Stage(stage).name] += duration
        blocks = (int(counters[-1, END]) - int(counters[0, BEGIN])) * per_cycle
        spent[BETWEEN] = blocks - float(own.sum())
        step = 1e3 * (at - before)
        spent[BESIDE] = step - blocks
        rows.append((step, spent))
    least = sorted(rows, key=lambda row: row[0])[: max(1, len(rows) // 2)]
    names = list(least[0][1])
    mean = {name: sum(spent[name] for _, spent in least) / len(least) for name in names}
    calls = Counter(Stage(stage).name for stage in steps[0][1][:, 0].tolist())
    return {
        "step": round(sum(step for step, _ in least) / len(least), 3),
        "milliseconds": {name: round(mean[name], 3) for name in sorted(names, key=lambda name: -mean[name])},
        "calls": dict(calls),
    }


def measure(engine: Engine, batch: int, context: int, tokens: int) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(0)
    vocab = engine.model.info.vocab_size
    prompts = torch.randint(min(100, vocab // 2), vocab, (batch, context), generator=generator).tolist()
    blocks = engine.model.decoder.compiled
    if blocks is None:
        raise SystemExit("the blocks of this model are not compiled: a step has no stages")
    # Prompts are read beside requests that decode already: some steps more until all do.
    tokens += batch
    blocks.on_step = recorded = Recorded(batch)
    try:
        run_requests(engine, prompts, [None] * batch, tokens)
    finally:
        blocks.on_step = None
    return milliseconds(recorded.steps)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--model", default="embedded")
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 16, 64])
    parser.add_argument("--context", type=int, default=128, help="tokens of each prompt")
    parser.add_argument("--steps", type=int, default=48)
    arguments = parser.parse_args()
    engine = Engine(load_model(arguments.model), EngineConfig(enable_prefix_cache=False))
    engine.start()
    found: dict[str, Any] = {}
    try:
        for batch in arguments.batches:
            own = found[str(batch)] = measure(engine, batch, arguments.context, arguments.steps)
            print(f"{batch} requests: a step of {own['step']:.2f} ms")
            for name, spent in own["milliseconds"].items():
                print(f"    {name:18} {spent:9.3f} ms   {own['calls'].get(name, ''):>4}")
    finally:
        engine.shutdown()
    record = {"threads": torch.get_num_threads(), "context": arguments.context, "steps": arguments.steps}
    print(f"written: {save('step', {**record, 'batches': found}).name}", file=sys.stderr)
    print(json.dumps({f"step_ms_{batch}": own["step"] for batch, own in found.items()}))


if __name__ == "__main__":
    main()
