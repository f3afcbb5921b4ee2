"""Starts the workers of peers: each in its own interpreter, which is installed where it is not there yet."""

import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from peers.cases import PROMPT, prompts
from peers.environments import LLAMA, OURS, WORKER_OF, NotInstalled, interpreter
from peers.process import WORKERS, CannotError, PeerError, Worker, environment
from peers.rounds import AT_REST, READY, Rounds

# Those that run the quantised file; the others have its float32 weights.
OF_THE_FILE = (OURS, LLAMA)
TRIES = 4


@dataclass(frozen=True)
class Start:
    """`interpreters`: of peers that are installed elsewhere. `starts`: of each worker; the first finds nothing in the
    page cache, and the last stays."""

    cache: Path
    interpreters: Mapping[str, str]
    file: Path
    directory: Path
    vectors: Path
    threads: int
    starts: int


def start_all(stack: ExitStack, peers: Sequence[str], start: Start, rounds: Rounds) -> dict[str, dict[str, Any]]:
    """Gives the workers that answer to `rounds`, with their figures READY and AT_REST. Returns by peer what it said of
    itself, or its error."""
    said: dict[str, dict[str, Any]] = {}
    for peer in peers:
        try:
            said[peer] = _start(stack, peer, start, rounds)
        except (NotInstalled, PeerError, CannotError, OSError) as error:
            said[peer] = {"error": str(error)}
            rounds.figure(READY, peer).reason = rounds.figure(AT_REST, peer).reason = str(error)
        print(f"{peer}: {said[peer]}", flush=True)
    return said


def _start(stack: ExitStack, peer: str, start: Start, rounds: Rounds) -> dict[str, Any]:
    python = start.interpreters.get(peer) or (sys.executable if peer == OURS else interpreter(start.cache, peer))
    command = [str(python), str(WORKERS / WORKER_OF[peer])]
    waits = _quicker_waits(command, start, rounds) if peer == LLAMA else "passive"
    for _ in range(start.starts - 1):
        with Worker(command, environment(start.threads, waits)) as worker:
            _load(worker, peer, start, rounds)
    worker = stack.enter_context(Worker(command, environment(start.threads, waits)))
    said = _load(worker, peer, start, rounds) | {"waits": waits or "as its libraries do"}
    rounds.figure(AT_REST, peer).values.append(worker.resident_bytes())
    rounds.workers[peer] = worker
    return said


def _quicker_waits(command: Sequence[str], start: Start, rounds: Rounds) -> str | None:
    """What the threads of llama.cpp do between its operations, of which a token has hundreds: sleep, as everybody's
    here, or spin a while, as its library does. It gets what decodes 8 requests quicker, the best of alternating tries.
    """
    given = prompts(rounds.setting.text, 8, PROMPT)
    best: dict[str | None, float] = {}
    with ExitStack() as stack:
        workers = {
            waits: stack.enter_context(Worker(command, environment(start.threads, waits)))
            for waits in ("passive", None)
        }
        for worker in workers.values():
            _ask_to_load(worker, LLAMA, start)
        for _ in range(TRIES):
            for waits, worker in workers.items():
                answer = worker.ask("decode", prompts=given, tokens=PROMPT, programs=[None] * 8, one_by_one=1)
                best[waits] = min(answer["decode_seconds"], best.get(waits, answer["decode_seconds"]))
    return min(best, key=lambda waits: best[waits])


def _ask_to_load(worker: Worker, peer: str, start: Start) -> dict[str, Any]:
    model = start.file if peer in OF_THE_FILE else start.directory
    said: dict[str, Any] = worker.ask("load", model=str(model), vectors=str(start.vectors), threads=start.threads)
    return said


def _load(worker: Worker, peer: str, start: Start, rounds: Rounds) -> dict[str, Any]:
    said = _ask_to_load(worker, peer, start)
    rounds.figure(READY, peer).values.append(time.perf_counter() - worker.started)
    return said
