"""Latency of an interactive stream of the embedded model beside analysis jobs.

    python benchmarks/beside.py [--tokens 192] [--rounds 3]

A server in a process of its own decodes one stream after another: alone, beside a running TEAL calibration, and beside
a search for a circuit, by turns. A job that ends is begun anew, and it has reported progress before a stream begins.
Whole runs are written to benchmarks/results/beside.json. The last line is a JSON object, by case:

    p50_ms, p99_ms, max_ms   between the tokens that the client sees, over all rounds
    first_ms                 median time to the first token
    job_steps_per_s          steps of progress of the job while streams ran (documents and layers; prompts and heads)
"""

import argparse
import itertools
import json
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path
from statistics import median, quantiles
from typing import Any

from measure import save
from serving import serving

from patchclamp import Client, PatchclampError
from patchclamp.heads import CleanCorruptPair
from patchclamp.results import Progress
from patchclamp.sparsity import teal

TEXT = Path(__file__).parents[1] / "server/patchclamp_server/analysis/data/ordinary.txt"
PROMPT = "Once upon a time there was a king who had"
CAPITALS = [("France", " Paris"), ("Italy", " Rome"), ("Germany", " Berlin"), ("Japan", " Tokyo")]


class Figures:
    """What the streams of one case saw."""

    def __init__(self) -> None:
        self.gaps: list[float] = []
        self.first: list[float] = []
        self.steps = 0
        self.seconds = 0.0

    def summary(self) -> dict[str, float]:
        cuts = quantiles(self.gaps, n=100, method="inclusive")
        found = {"p50_ms": cuts[49], "p99_ms": cuts[98], "max_ms": max(self.gaps), "first_ms": median(self.first)}
        shown = {name: round(1000 * seconds, 2) for name, seconds in found.items()}
        return shown | {"job_steps_per_s": round(self.steps / self.seconds, 2)}


class Steps:
    """Counted by the thread that follows the job."""

    def __init__(self) -> None:
        self.done = 0
        self.begun = threading.Event()
        self.stopped = False
        self.error: Exception | None = None


def calibration(client: Client) -> Any:
    text = TEXT.read_text(encoding="utf-8")
    return client.calibrate_profile(teal(keep_ratio=0.5), text, document_tokens=256)


def circuit(client: Client) -> Any:
    pairs = [
        CleanCorruptPair(f"The capital of {clean} is", f"The capital of {corrupt} is", capital, other)
        for (clean, capital), (corrupt, other) in itertools.permutations(CAPITALS, 2)
    ]
    return client.find_circuit(pairs, "mean_ablation", circuit_size=10)


JOBS: dict[str, Callable[[Client], Any]] = {"calibration": calibration, "circuit": circuit}


@contextmanager
def beside(address: str, begin: Callable[[Client], Any] | None) -> Iterator[Steps]:
    """The job runs, again and again, until the end of the block."""
    steps = Steps()
    if begin is None:
        yield steps
        return

    def follow() -> None:
        try:
            with Client(address) as client:
                while not steps.stopped:
                    with begin(client) as stream:
                        for event in stream:
                            if steps.stopped:
                                break
                            if isinstance(event, Progress):
                                steps.done += 1
                                steps.begun.set()
        except PatchclampError as error:
            steps.error = error
        finally:
            steps.begun.set()

    thread = threading.Thread(target=follow)
    thread.start()
    try:
        steps.begun.wait()
        yield steps
        if steps.error is not None:
            raise steps.error
    finally:
        steps.stopped = True
        thread.join()


def stream_once(client: Client, tokens: int, figures: Figures, steps: Steps) -> None:
    arrivals: list[float] = []
    before, started = steps.done, time.perf_counter()
    with client.generate(PROMPT, max_tokens=tokens, temperature=0.0, ignore_eos=True) as stream:
        for chunk in stream:
            # What came together was kept together: the gaps between are 0 to whoever reads.
            arrivals += [time.perf_counter()] * len(chunk.tokens)
    figures.seconds += time.perf_counter() - started
    figures.steps += steps.done - before
    figures.first.append(arrivals[0] - started)
    figures.gaps += [after - earlier for earlier, after in pairwise(arrivals)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=192, help="of each stream")
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    cases: dict[str, Callable[[Client], Any] | None] = {"alone": None, **JOBS}
    found = {case: Figures() for case in cases}
    with serving() as server, Client(server.address) as client:
        stream_once(client, 32, Figures(), Steps())
        for _ in range(options.rounds):
            for case, begin in cases.items():
                with beside(server.address, begin) as steps:
                    stream_once(client, options.tokens, found[case], steps)
                print(case, found[case].summary(), flush=True)
    result = {case: figures.summary() for case, figures in found.items()}
    if vars(options) == vars(parser.parse_args([])):
        print(f"written: {save('beside', {**vars(options), 'cases': result}).name}")
    print(json.dumps(result))


if __name__ == "__main__":
    main()
