"""A process that serves a model, fills its KV cache with the largest steps, and prints what was planned and what it
takes: python memory_worker.py DIRECTORY."""

import json
import re
import sys
import threading
from pathlib import Path

from patience import PATIENCE_SECONDS

from patchclamp_server.engine.config import EngineConfig
from patchclamp_server.engine.engine import Engine
from patchclamp_server.engine.request import Event, Finished, Request, Token
from patchclamp_server.rpc.at_start import load
from patchclamp_server.rpc.config import ServerConfig
from patchclamp_server.rpc.server import Server

TOKENS = 4096
# Each prompt begins with another token, so that none shares blocks with another.
PROMPT = 1000


def main(directory: str) -> None:
    loaded = load(ServerConfig(model=directory, engine=EngineConfig(kv_cache_tokens=TOKENS)))
    server = Server(*loaded)
    fill(server.engine)
    print(json.dumps({"planned": loaded.plan.total, "resident": resident(), **loaded.plan.parts}))


def fill(engine: Engine) -> None:
    """Scores prompts, which asks for the logits of all rows."""
    engine.start()
    ended = [threading.Event() for _ in range(TOKENS // PROMPT)]
    for i, end in enumerate(ended):
        tokens = tuple(token % engine.model.info.vocab_size for token in (i, *range(10, 9 + PROMPT)))

        def on_event(event: Event, end: threading.Event = end) -> None:
            if not isinstance(event, Token):
                assert isinstance(event, Finished), event
                end.set()

        engine.submit(Request(tokens, on_event, score_from=1))
    assert all(end.wait(PATIENCE_SECONDS) for end in ended)
    engine.shutdown()


def resident() -> int:
    rollup = Path("/proc/self/smaps_rollup").read_text()
    found = re.search(r"^Rss:\s+(\d+) kB", rollup, re.MULTILINE)
    assert found is not None
    return int(found[1]) * 1024


if __name__ == "__main__":
    main(*sys.argv[1:])
