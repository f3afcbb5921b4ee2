"""How fast one sequence decodes under a policy, against the dense model: both in one run, by turns, in the engine.

seconds per token = median of the times between the tokens of RUNS / 2 sequences each
"""

import queue
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

from patchclamp_server.analysis.progress import Steps
from patchclamp_server.engine.engine import Engine
from patchclamp_server.engine.request import (
    Event,
    Failed,
    Finished,
    Priority,
    Request,
    SparseInference,
    StopParams,
    Token,
)
from patchclamp_server.errors import InvalidArgument
from patchclamp_server.sparsity.binder import Bound

TOKENS = 33
# Sequences, dense and sparse by turns. The first of each, which may have to make what the others use, does not count.
RUNS = 8


@dataclass(frozen=True)
class SpeedCard:
    """Fields as in the message SpeedCard."""

    dense_seconds_per_token: float
    sparse_seconds_per_token: float
    speedup: float
    tokens: int


def measure_speed(engine: Engine, bound: Bound, prompt: Sequence[int], steps: Steps) -> SpeedCard:
    """Decodes after `prompt`; a sequence is a step. Raises what the engine refuses or fails with."""
    room = engine.model.info.context_length - len(prompt)
    if room < 3:
        raise InvalidArgument("text.document_tokens", f"a prompt of {len(prompt)} tokens leaves none to decode")
    sparse = SparseInference(bound.policy.name, bound.selector, bound.profile)
    times: dict[bool, list[float]] = {False: [], True: []}
    for run in range(RUNS):
        is_sparse = run % 2 == 1
        intervals = _decode(engine, prompt, min(TOKENS, room), sparse if is_sparse else None)
        if run >= 2:
            times[is_sparse] += intervals
        steps.advance()
    dense_seconds, sparse_seconds = statistics.median(times[False]), statistics.median(times[True])
    return SpeedCard(dense_seconds, sparse_seconds, dense_seconds / sparse_seconds, len(times[True]))


def _decode(engine: Engine, prompt: Sequence[int], tokens: int, sparsity: SparseInference | None) -> list[float]:
    """Seconds between the tokens of one sequence."""
    events: queue.SimpleQueue[tuple[float, Event]] = queue.SimpleQueue()
    request = Request(
        tokens=tuple(prompt),
        on_event=lambda event: events.put((time.perf_counter(), event)),
        stop=StopParams(max_tokens=tokens, ignore_eos=True),
        priority=Priority.ANALYSIS,
        sparsity=sparsity,
    )
    request_id = engine.submit(request)
    arrivals: list[float] = []
    try:
        while True:
            at, event = events.get()
            match event:
                case Token():
                    arrivals.append(at)
                case Finished():
                    return [after - before for before, after in pairwise(arrivals)]
                case Failed(error):
                    raise error
    finally:
        engine.cancel(request_id)
