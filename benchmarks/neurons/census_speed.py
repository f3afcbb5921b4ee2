"""The census: its speed beside that of plain requests, and a stream beside it."""

import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from statistics import median
from typing import Any

from beside import Figures, Steps, beside, stream_once
from brown import DESCRIPTION, brown_directory
from measure import alternate

from neurons.census import CORPUS, WINDOW, corpus_server
from neurons.shown import say
from patchclamp.neurons import TextSource


@dataclass(frozen=True)
class Sizes:
    """`windows`: of each round of the comparison with plain requests, as many as a census needs to get past its
    beginning, when every neuron may still be a detector. `stream_tokens`: of each stream beside one."""

    windows: int = 64
    rounds: int = 3
    stream_tokens: int = 384


def measure(sizes: Sizes) -> dict[str, Any]:
    rate = against_prefill(sizes)
    streams = beside_streams(sizes)
    return {
        "text": DESCRIPTION,
        "sizes": vars(sizes),
        "census_vs_prefill_rate": rate["ratio"],
        "rate": rate,
        "decode_p99_beside_census_ratio": streams["beside"]["p99_ms"] / streams["alone"]["p99_ms"],
        "streams": streams,
    }


def against_prefill(sizes: Sizes) -> dict[str, Any]:
    """Tokens a second of a census, and of plain requests with the same windows, by turns. Nothing is cached."""
    with corpus_server("--prefix-cache=off") as (_, client):
        texts = (path.read_text() for path in sorted(brown_directory().glob("*.txt")))
        windows = [client.tokenize(next(texts)).ids[:WINDOW] for _ in range(sizes.windows)]

        def census() -> float:
            started = time.perf_counter()
            client.census_neurons(TextSource(windows, WINDOW), restart=True).result()
            return time.perf_counter() - started

        def plain() -> float:
            started = time.perf_counter()
            with ThreadPoolExecutor(len(windows)) as pool:
                list(pool.map(lambda ids: client.generate(ids, max_tokens=1, ignore_eos=True).result(), windows))
            return time.perf_counter() - started

        seconds = alternate({"census": census, "plain": plain}, sizes.rounds)
    tokens = sum(map(len, windows))
    found = {name: tokens / median(each) for name, each in seconds.items()}
    say(f"census {found['census']:.0f} tokens/s as its client sees it, plain requests {found['plain']:.0f}")
    return {"tokens": tokens, "tokens_per_second": found, "ratio": found["census"] / found["plain"]}


def beside_streams(sizes: Sizes) -> dict[str, Any]:
    """Gaps between the tokens of a stream, alone and beside a census, by turns."""
    found = {"alone": Figures(), "beside": Figures()}
    with corpus_server() as (server, client):
        stream_once(client, 32, Figures(), Steps())
        for _ in range(sizes.rounds):
            for case, figures in found.items():
                begin = None if case == "alone" else lambda own: own.census_neurons(CORPUS, restart=True)
                with beside(server.address, begin) as steps:
                    stream_once(client, sizes.stream_tokens, figures, steps)
                say(f"a stream {case}{' a census' if begin else ''}: {figures.summary()}")
    return {case: figures.summary() for case, figures in found.items()}
