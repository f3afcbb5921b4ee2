"""Random and mutated calls of every RPC against servers of tiny random models, through real channels.

    python benchmarks/fuzz.py --requests 10000 --seed 0

A call is right with one to four of its fields changed, or right as it is, or with other texts, chats or files, or bytes
that are no message, or of a method that does not exist, cut short, cancelled, or of a stream where one message is
expected. A part of the calls goes to models with random tokenizers, vocabularies and chat templates.

Every call must end with a status of a closed set. No call, and no small call beside them, may take longer than
WORST_SECONDS. Afterwards each server must be alive and SERVING, hold nothing, have nothing left to compute, and have
grown by little. Calls that end otherwise are printed as text. The last line is a JSON object; the exit status is 1 when
anything was found.
"""

import argparse
import json
import sys
import tempfile
import time
from pathlib import Path
from random import Random
from typing import Any

sys.path[:0] = [str(Path(__file__).parent), *(str(Path(__file__).parents[1] / p) for p in ("tests", "tests/rpc"))]
from fuzzing.cases import Case, cases, methods
from fuzzing.clients import DECLARED, Ended, Fuzzer
from fuzzing.models import save_random_model
from fuzzing.times import WORST_SECONDS, percentile
from seed_requests import calls
from tiny_llama import save_tiny_llama

__all__ = ["DECLARED", "calls", "cases", "failed", "fuzz", "methods"]

MOST_GROWTH = 1.5
# Calls that one random model gets, and the share of all calls that all of them get.
OF_ONE_MODEL = 300
SHARE_OF_MODELS = 0.3
MOST_MODELS = 10


def fuzz(requests: int, seed: int) -> dict[str, Any]:
    """Runs the calls, prints what was found, and returns it."""
    everything = list(cases(seed, requests))
    n_models = min(MOST_MODELS, int(requests * SHARE_OF_MODELS) // OF_ONE_MODEL)
    # The rest goes to a model that is right, which also shows whether memory grows.
    rest = len(everything) - n_models * OF_ONE_MODEL
    fuzzer, random = Fuzzer(), Random(seed)
    started = time.monotonic()
    main = _serve(fuzzer, everything[:rest], None)
    ended = [main]
    for i in range(n_models):
        start = rest + i * OF_ONE_MODEL
        ended.append(_serve(fuzzer, everything[start : start + OF_ONE_MODEL], random))
    found = fuzzer.found
    for text in found.failures:
        print(text)
    for code, count in found.codes.most_common():
        print(f"{count:7d} {code}")
    return {
        "requests": requests,
        "seed": seed,
        "models": len(ended),
        "methods": len(methods()),
        "uncalled": sorted(m.path for m in methods().values() if not found.by_method[m.path]),
        "codes": dict(found.codes),
        "undeclared": len(found.failures),
        "alive": all(each.alive for each in ended),
        "serving": all(each.serving for each in ended),
        "held": {name: value for each in ended for name, value in each.held.items()},
        "rss_growth_ratio": round(main.growth, 3),
        "p99_seconds": round(percentile(found.seconds, 0.99), 3),
        "worst_seconds": round(found.slowest[0], 3),
        "slowest": found.slowest[1],
        "worst_wait_seconds": round(max(each.waited for each in ended), 3),
        "worst_idle_seconds": round(max(each.idle_seconds for each in ended), 3),
        "seconds": round(time.monotonic() - started, 1),
    }


def failed(result: dict[str, Any]) -> bool:
    grown = result["rss_growth_ratio"] > MOST_GROWTH
    slow = any(result[f"worst_{what}seconds"] > WORST_SECONDS for what in ("", "wait_", "idle_"))
    return bool(result["undeclared"] or result["held"] or not result["serving"] or result["uncalled"] or grown or slow)


def _serve(fuzzer: Fuzzer, everything: list[Case], random: Random | None) -> Ended:
    """The calls to the tiny llama, or to a random model; what the server logged, where something was found."""
    failures = len(fuzzer.found.failures)
    with tempfile.TemporaryDirectory(prefix="patchclamp-fuzz-") as directory:
        described = "the tiny llama"
        if random is None:
            save_tiny_llama(Path(directory))
        else:
            described = save_random_model(Path(directory), random)
        print(f"{len(everything)} calls to {described}", file=sys.stderr)
        ended = fuzzer.serve(Path(directory), everything)
    if len(fuzzer.found.failures) > failures or ended.held or not ended.serving:
        print(ended.log[-20000:], file=sys.stderr)
    return ended


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--requests", type=int, default=10_000)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    result = fuzz(arguments.requests, arguments.seed)
    print(json.dumps(result))
    return int(failed(result))


if __name__ == "__main__":
    sys.exit(main())
