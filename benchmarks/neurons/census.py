"""The census: memory and speed over much text, a kill in the middle, and a stream beside it.

Texts are the documents of the Brown corpus (brown.py). Each size runs in a server of its own, whose peak of memory is
counted from after it has answered its first request.
"""

import json
import re
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

from beside import Figures, Steps, beside, stream_once
from brown import DESCRIPTION, brown_directory
from measure import alternate
from serving import ServerProcess

from neurons.shown import say, shows_progress
from patchclamp import Client, PatchclampError
from patchclamp.neurons import TextSource
from patchclamp.results import NeuronCensus, Progress

MODEL = "embedded"
CORPUS = "brown"
WINDOW = 512


@dataclass(frozen=True)
class Sizes:
    """`tokens`: of a short and a long census. `rate_windows`: of each round of the comparison with plain requests, as
    many as a census needs to get past its beginning, when every neuron may still be a detector.
    `killed_tokens`: of the census that is killed in the middle. `stream_tokens`: of each stream beside one."""

    tokens: tuple[int, int] = (100_000, 1_000_000)
    rate_windows: int = 64
    rounds: int = 3
    killed_tokens: int = 20_000
    checkpoint_tokens: int = 4_000
    stream_tokens: int = 384


def measure(sizes: Sizes) -> dict[str, Any]:
    rate = against_prefill(sizes)
    streams = beside_streams(sizes)
    killed = killed_and_resumed(sizes)
    memory = {tokens: over(tokens) for tokens in sizes.tokens}
    short, long = memory.values()
    return {
        "text": DESCRIPTION,
        "sizes": vars(sizes),
        "census_vs_prefill_rate": rate["ratio"],
        "rate": rate,
        "decode_p99_beside_census_ratio": streams["beside"]["p99_ms"] / streams["alone"]["p99_ms"],
        "streams": streams,
        "killed": killed,
        "census_rss_growth_ratio": long["peak_rss_bytes"] / short["peak_rss_bytes"],
        "memory": memory,
    }


def over(tokens: int) -> dict[str, Any]:
    """A census of so many tokens in a fresh server: its peak of memory, its speed, and what it counts."""
    with _server() as (server, client):
        client.generate("Once upon a time", max_tokens=4).result()
        _forget_peak(server)
        census = client.census_neurons(TextSource(CORPUS, WINDOW, tokens), tags=["usual"]).result(_says(tokens))
        peak = _peak(server)
    counts = ("neurons", "dead", "rare", "always", "token_detectors", "ngram_detectors", "positional")
    row = {
        "tokens": census.tokens,
        "tokens_per_second": census.tokens_per_second,
        "peak_rss_bytes": peak,
        **{name: sum(getattr(layer, name) for layer in census.layers) for name in counts},
    }
    say(f"census of {census.tokens:,} tokens: {census.tokens_per_second:.0f} tokens/s, peak {peak / 2**20:.0f} MiB")
    return row


def against_prefill(sizes: Sizes) -> dict[str, Any]:
    """Tokens a second of a census, and of plain requests with the same windows, by turns. Nothing is cached."""
    with _server("--prefix-cache=off") as (_, client):
        texts = (path.read_text() for path in sorted(brown_directory().glob("*.txt")))
        windows = [client.tokenize(next(texts)).ids[:WINDOW] for _ in range(sizes.rate_windows)]

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
    with _server() as (server, client):
        stream_once(client, 32, Figures(), Steps())
        for _ in range(sizes.rounds):
            for case, figures in found.items():
                begin = None if case == "alone" else lambda own: own.census_neurons(CORPUS, restart=True)
                with beside(server.address, begin) as steps:
                    stream_once(client, sizes.stream_tokens, figures, steps)
                say(f"a stream {case}{' a census' if begin else ''}: {figures.summary()}")
    return {case: figures.summary() for case, figures in found.items()}


def killed_and_resumed(sizes: Sizes) -> dict[str, Any]:
    """A server is killed in the middle of a census, and another goes on with its artifacts."""
    source = TextSource(CORPUS, WINDOW, sizes.killed_tokens)
    seen = 0
    with tempfile.TemporaryDirectory(prefix="patchclamp-") as artifacts:
        with _server(artifacts=Path(artifacts)) as (server, client):
            stream = client.census_neurons(source, checkpoint_tokens=sizes.checkpoint_tokens)
            try:
                for event in stream:
                    seen = event.done if isinstance(event, Progress) else seen
                    if server.is_alive and seen > sizes.killed_tokens // 2:
                        server.kill()
            except PatchclampError:
                say(f"killed after {seen:,} of {sizes.killed_tokens:,} tokens")
        with _server(artifacts=Path(artifacts), holds_corpus=True) as (_, client):
            stream = client.census_neurons(source, checkpoint_tokens=sizes.checkpoint_tokens)
            census: NeuronCensus = stream.result(shows_progress)
    lost = seen - census.resumed_tokens
    say(
        f"resumed at {census.resumed_tokens:,} tokens: {lost:,} were done again, a checkpoint is every "
        f"{sizes.checkpoint_tokens:,}"
    )
    return {
        "tokens": census.tokens,
        "seen": seen,
        "resumed_tokens": census.resumed_tokens,
        "lost_tokens": lost,
        "checkpoint_tokens": sizes.checkpoint_tokens,
        # Checkpoints are written between windows that end together.
        "lost_checkpoints": lost / sizes.checkpoint_tokens,
    }


@contextmanager
def _server(
    *options: str, artifacts: Path | None = None, holds_corpus: bool = False
) -> Iterator[tuple[ServerProcess, Client]]:
    """A fresh server that holds the corpus, which may be killed."""
    with (
        tempfile.TemporaryDirectory(prefix="patchclamp-") as own,
        ServerProcess(MODEL, artifacts or Path(own), *options) as server,
        Client(server.address) as client,
    ):
        if not holds_corpus:
            texts = [path.read_text() for path in sorted(brown_directory().glob("*.txt"))]
            lines = "\n".join(json.dumps({"text": text}) for text in texts)
            client.put_artifact(lines.encode(), kind="corpus", format="text_json_lines", tags=[CORPUS])
        yield server, client


def _says(tokens: int) -> Any:
    """Says each tenth of a census."""
    told = 0

    def on_event(event: Any) -> None:
        nonlocal told
        if isinstance(event, Progress) and event.done * 10 >= (told + 1) * tokens:
            told = event.done * 10 // tokens
            say(f"{event.done:,} of {tokens:,} tokens")

    return on_event


def _forget_peak(server: ServerProcess) -> None:
    Path(f"/proc/{server.process.pid}/clear_refs").write_text("5")


def _peak(server: ServerProcess) -> int:
    """Bytes."""
    status = Path(f"/proc/{server.process.pid}/status").read_text()
    found = re.search(r"VmHWM:\s+(\d+) kB", status)
    assert found is not None
    return 1024 * int(found[1])
