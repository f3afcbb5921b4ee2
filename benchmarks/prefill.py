"""What a long prompt does to a stream that decodes beside it, by the most rows of a step.

    python benchmarks/prefill.py [--rounds 3] [--rows 64 128 256 512] [--lengths 512 2048]

One server for each `--max-tokens-per-step`, with the embedded model. Alone, a prompt of each length: tokens a second
until the first token. Then one stream decodes while prompts of 2,048 tokens come one after the other: its gaps between
tokens (median, 99th percentile, longest), and the rate of the prompts. Writes benchmarks/results/prefill.json, and
prints a JSON object as its last line.
"""

import argparse
import json
import random
import tempfile
import threading
import time
from contextlib import ExitStack
from itertools import pairwise
from pathlib import Path
from statistics import median, quantiles
from typing import Any

from measure import alternate, save
from peers.process import environment
from serving import ServerProcess

from patchclamp import Client

BESIDE = 2048
PROMPTS = 3


def prompt(length: int, seed: int) -> list[int]:
    """Different every time: no prefix is found again."""
    return random.Random(seed).choices(range(1000, 40000), k=length)


def prefill(address: str, length: int) -> float:
    """Tokens a second from a request to its first token."""
    with Client(address) as client:
        # Connected before the clock begins.
        client.generate([1000], max_tokens=1).result()
        tokens = prompt(length, time.perf_counter_ns())
        started = time.perf_counter()
        client.generate(tokens, max_tokens=1, ignore_eos=True).result()
        return length / (time.perf_counter() - started)


def beside(address: str) -> dict[str, float]:
    """Gaps of a stream, in milliseconds, while prompts come, and the rate of these."""
    times: list[float] = []
    started, ended = threading.Event(), threading.Event()

    def follow() -> None:
        with Client(address) as client, client.generate(prompt(32, 1), max_tokens=4000, ignore_eos=True) as stream:
            for chunk in stream:
                times.extend(time.perf_counter() for _ in chunk.tokens)
                started.set()
                if ended.is_set():
                    break

    follower = threading.Thread(target=follow)
    follower.start()
    started.wait()
    begun = time.perf_counter()
    rates = [prefill(address, BESIDE) for _ in range(PROMPTS)]
    until = time.perf_counter()
    ended.set()
    follower.join()
    gaps = [1e3 * (b - a) for a, b in pairwise(times) if begun <= a and b <= until]
    return {
        "median_ms": median(gaps),
        "p99_ms": quantiles(gaps, n=100, method="inclusive")[-1],
        "longest_ms": max(gaps),
        "prompt_tokens_per_second": median(rates),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--rows", type=int, nargs="+", default=[64, 128, 256, 512])
    parser.add_argument("--lengths", type=int, nargs="+", default=[512, 2048])
    arguments = parser.parse_args()
    found: dict[str, dict[str, Any]] = {str(rows): {} for rows in arguments.rows}
    with ExitStack() as stack:
        directory = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="patchclamp-")))
        addresses = {
            str(rows): stack.enter_context(
                ServerProcess(
                    "embedded",
                    directory / str(rows),
                    f"--max-tokens-per-step={rows}",
                    "--kv-cache-tokens=16384",
                    environment=environment(2),
                )
            ).address
            for rows in arguments.rows
        }
        for length in arguments.lengths:
            alone = {rows: lambda at=at, n=length: prefill(at, n) for rows, at in addresses.items()}
            for rows, rates in alternate(alone, arguments.rounds).items():
                found[rows][f"prefill_{length}"] = round(median(rates), 1)
        both = {rows: lambda at=at: beside(at) for rows, at in addresses.items()}
        for rows, figures in alternate(both, arguments.rounds).items():
            for name in figures[0]:
                found[rows][name] = round(median(own[name] for own in figures), 2)
    result = {"rounds": arguments.rounds, "beside": BESIDE, "rows": found}
    save("prefill", result)
    print(json.dumps(result))


if __name__ == "__main__":
    main()
