"""How fast one sequence decodes under a policy, against the dense model: both in one run, by turns, in the engine.

seconds per token = median of the times between the tokens of RUNS / 2 sequences each
"""

import statistics
import time
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from dataclasses import dataclass
from itertools import pairwise

from patchclamp_server.analysis.progress import Progress, Steps
from patchclamp_server.analysis.requests import OnEvent, completed
from patchclamp_server.engine.engine import Engine
from patchclamp_server.engine.request import Event, Priority, Request, SparseInference, StopParams, Token
from patchclamp_server.errors import InvalidArgument
from patchclamp_server.sparsity.binder import Bound

TOKENS = 33
# Sequences run dense and sparse by turns. The first of each may make what the others use: it does not count.
RUNS = 8


@dataclass(frozen=True)
class SpeedCard:
    """Has the fields of the message SpeedCard."""

    dense_seconds_per_token: float
    sparse_seconds_per_token: float
    speedup: float
    tokens: int


async def measure_speed(
    engine: Engine, bound: Bound, prompt: Sequence[int], steps: Steps
) -> AsyncGenerator[Progress | SpeedCard, None]:
    """Decodes after `prompt`; a sequence is a step. Yields progress, then the card. Raises what the engine refuses a
    request with, or fails with."""
    room = engine.model.info.context_length - len(prompt)
    if room < 3:
        raise InvalidArgument("text.document_tokens", f"a prompt of {len(prompt)} tokens leaves none to decode")
    sparse = SparseInference(bound.policy.name, bound.selector, bound.profile)
    times: dict[bool, list[float]] = {False: [], True: []}
    for run in range(RUNS):
        is_sparse = run % 2 == 1
        intervals = await _decode(engine, prompt, min(TOKENS, room), sparse if is_sparse else None)
        if run >= 2:
            times[is_sparse] += intervals
        yield steps.advance()
    dense_seconds, sparse_seconds = statistics.median(times[False]), statistics.median(times[True])
    yield SpeedCard(dense_seconds, sparse_seconds, dense_seconds / sparse_seconds, len(times[True]))


async def _decode(engine: Engine, prompt: Sequence[int], tokens: int, sparsity: SparseInference | None) -> list[float]:
    """Returns the seconds between the tokens of one sequence."""
    arrivals: list[float] = []

    def request(on_event: OnEvent) -> Request:
        def timed(event: Event) -> None:
            if isinstance(event, Token):
                arrivals.append(time.perf_counter())
            on_event(event)

        return Request(
            tokens=tuple(prompt),
            on_event=timed,
            stop=StopParams(max_tokens=tokens, ignore_eos=True),
            priority=Priority.ANALYSIS,
            sparsity=sparsity,
        )

    async with aclosing(completed(engine, [request])) as finished:
        await anext(finished)
    return [after - before for before, after in pairwise(arrivals)]
