"""The census: memory over much text, and a kill in the middle.

Texts are the documents of the Brown corpus (brown.py). Each size runs in a server of its own, whose peak of memory is
counted from after it has answered its first request.
"""

import json
import re
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from brown import DESCRIPTION, brown_directory
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
    """`tokens`: of a short and a long census. `killed_tokens`: of the census that is killed in the middle."""

    tokens: tuple[int, int] = (100_000, 1_000_000)
    killed_tokens: int = 20_000
    checkpoint_tokens: int = 4_000


def measure(sizes: Sizes) -> dict[str, Any]:
    killed = killed_and_resumed(sizes)
    memory = {tokens: over(tokens) for tokens in sizes.tokens}
    short, long = memory.values()
    return {
        "text": DESCRIPTION,
        "sizes": vars(sizes),
        "killed": killed,
        "census_rss_growth_ratio": long["peak_rss_bytes"] / short["peak_rss_bytes"],
        "memory": memory,
    }


def over(tokens: int) -> dict[str, Any]:
    """A census of so many tokens in a fresh server: its peak of memory, and what it counts."""
    with corpus_server() as (server, client):
        client.generate("Once upon a time", max_tokens=4).result()
        _forget_peak(server)
        census = client.census_neurons(TextSource(CORPUS, WINDOW, tokens), tags=["usual"]).result(_says(tokens))
        peak = _peak(server)
    counts = ("neurons", "dead", "rare", "always", "token_detectors", "ngram_detectors", "positional")
    row = {
        "tokens": census.tokens,
        "peak_rss_bytes": peak,
        **{name: sum(getattr(layer, name) for layer in census.layers) for name in counts},
    }
    say(f"census of {census.tokens:,} tokens: peak {peak / 2**20:.0f} MiB")
    return row


def killed_and_resumed(sizes: Sizes) -> dict[str, Any]:
    """A server is killed in the middle of a census, and another goes on with its artifacts."""
    source = TextSource(CORPUS, WINDOW, sizes.killed_tokens)
    seen = 0
    with tempfile.TemporaryDirectory(prefix="patchclamp-") as artifacts:
        with corpus_server(artifacts=Path(artifacts)) as (server, client):
            stream = client.census_neurons(source, checkpoint_tokens=sizes.checkpoint_tokens)
            try:
                for event in stream:
                    seen = event.done if isinstance(event, Progress) else seen
                    if server.is_alive and seen > sizes.killed_tokens // 2:
                        server.kill()
            except PatchclampError:
                say(f"killed after {seen:,} of {sizes.killed_tokens:,} tokens")
        with corpus_server(artifacts=Path(artifacts), holds_corpus=True) as (_, client):
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
def corpus_server(
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
