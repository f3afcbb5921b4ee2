"""What threads give, and what they take from others: `serve --threads 1 | 2`, and 2 with `--pin-threads on`.

    python benchmarks/threads.py [--rounds 5] [--tokens 96]

All servers are up at once, with the embedded model, and asleep but for the one that decodes: 1 and 16 requests, in
alternating rounds. Then the same with a neighbour, a process that counts on one core: tokens a second of one request,
and how much of what the neighbour counts alone it counts beside it. `idle` is what it counts beside servers that have
nothing to do: threads that spin would take it. Writes benchmarks/results/threads.json, and prints a JSON object as its
last line.
"""

import argparse
import json
import multiprocessing
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from multiprocessing.sharedctypes import Synchronized
from pathlib import Path
from statistics import median
from typing import Any

from measure import alternate, save
from peers.process import environment
from serving import ServerProcess

from patchclamp import Client

WAYS = {
    "1 thread": ("--threads=1",),
    "2 threads": ("--threads=2",),
    "2 threads, pinned": ("--threads=2", "--pin-threads=on"),
}
PROMPT = tuple(range(1000, 1032))
REQUESTS = (1, 16)


def decode(address: str, requests: int, tokens: int) -> float:
    """Tokens a second of all requests, after the first token of each."""
    times: list[list[float]] = [[] for _ in range(requests)]

    def follow(own: list[float], place: int) -> None:
        prompt = (*PROMPT[place % len(PROMPT) :], *PROMPT)
        for chunk in client.generate(prompt, max_tokens=tokens, ignore_eos=True):
            own.extend(time.perf_counter() for _ in chunk.tokens)

    with Client(address) as client:
        followers = [threading.Thread(target=follow, args=(own, i)) for i, own in enumerate(times)]
        for follower in followers:
            follower.start()
        for follower in followers:
            follower.join()
    first, last = max(own[0] for own in times), min(own[-1] for own in times)
    return sum(sum(first < at <= last for at in own) for own in times) / (last - first)


def count(counted: "Synchronized[int]") -> None:
    n = 0
    while True:
        n += 1
        if n % 4096 == 0:
            counted.value = n


@contextmanager
def neighbour() -> Iterator["Synchronized[int]"]:
    counted: Synchronized[int] = multiprocessing.Value("q", 0)
    process = multiprocessing.Process(target=count, args=(counted,), daemon=True)
    process.start()
    try:
        yield counted
    finally:
        process.kill()
        process.join()


def beside(counted: "Synchronized[int]", work: Callable[[], float]) -> tuple[float, float]:
    """What the work returns, and what the neighbour counts a second meanwhile."""
    started, before = time.perf_counter(), counted.value
    result = work()
    return result, (counted.value - before) / (time.perf_counter() - started)


def rest() -> float:
    time.sleep(1.0)
    return 0.0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--tokens", type=int, default=96)
    arguments = parser.parse_args()
    found: dict[str, dict[str, Any]] = {way: {} for way in WAYS}
    with ExitStack() as stack:
        directory = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="patchclamp-")))
        with neighbour() as counted:
            time.sleep(0.5)
            alone = beside(counted, rest)[1]
        servers = {
            way: stack.enter_context(
                ServerProcess("embedded", directory / str(i), *options, environment=environment(2))
            )
            for i, (way, options) in enumerate(WAYS.items())
        }
        for requests in REQUESTS:
            runs = {
                way: lambda own=own, n=requests: decode(own.address, n, arguments.tokens)
                for way, own in servers.items()
            }
            for way, rates in alternate(runs, arguments.rounds).items():
                found[way][f"tokens_per_second_{requests}"] = round(median(rates), 1)
        with neighbour() as counted:
            idle = median(beside(counted, rest)[1] for _ in range(arguments.rounds)) / alone
            shared = {
                way: lambda own=own: beside(counted, lambda: decode(own.address, 1, arguments.tokens))
                for way, own in servers.items()
            }
            for way, pairs in alternate(shared, arguments.rounds).items():
                found[way]["tokens_per_second_beside"] = round(median(rate for rate, _ in pairs), 1)
                found[way]["neighbour_keeps"] = round(median(own for _, own in pairs) / alone, 3)
    result = {"rounds": arguments.rounds, "tokens": arguments.tokens, "neighbour_idle": round(idle, 3), "ways": found}
    save("threads", result)
    print(json.dumps(result))


if __name__ == "__main__":
    main()
