"""What single tokens project on a vector that was found from pooled states.

A gate, an abort condition, a readout and a watch see one token at a time. The midpoint of an extraction lies between
means of pooled states, which may be far from where single tokens lie; these figures say where that is.
"""

from collections.abc import AsyncGenerator, Mapping, Sequence
from contextlib import aclosing
from dataclasses import dataclass
from functools import partial

import torch

from patchclamp_server.analysis.requests import OnEvent, completed
from patchclamp_server.engine.engine import Engine
from patchclamp_server.engine.request import Priority, Readouts, Request, StopParams
from patchclamp_server.interventions.bind import bind
from patchclamp_server.interventions.bound import BoundProgram
from patchclamp_server.interventions.program import (
    PositionRange,
    Program,
    ProjectionReadout,
    Readout,
    Scope,
    TokenSelector,
    Vector,
)
from patchclamp_server.model.info import ModelInfo
from patchclamp_server.model.sites import Site

# This bounds the examples of each side: what a step computes of them at all layers comes to the host token by token.
MAX_EXAMPLES = 64
# The first token is an attention sink in most models: its projection says nothing of the text.
_ALL_BUT_THE_FIRST = Scope((TokenSelector(positions=PositionRange(1)),))


@dataclass(frozen=True)
class TokenProjections:
    """The mean and quantiles of h·v/|v| over `tokens` tokens. All are 0 where there are none."""

    tokens: int
    mean: float
    p05: float
    p25: float
    p50: float
    p75: float
    p95: float

    @classmethod
    def of(cls, values: Sequence[float]) -> "TokenProjections":
        if not values:
            return cls(0, *([0.0] * 6))
        found = torch.tensor(values, dtype=torch.float64)
        quantiles = found.quantile(torch.tensor([0.05, 0.25, 0.5, 0.75, 0.95], dtype=torch.float64))
        return cls(len(values), float(found.mean()), *quantiles.tolist())


async def project(
    engine: Engine,
    info: ModelInfo,
    examples: Sequence[tuple[int, ...]],
    site: Site,
    directions: Mapping[int, torch.Tensor],
) -> AsyncGenerator[dict[int, list[float]], None]:
    """Yields, for each example and layer, what its tokens but the first project on the direction [width] there.

    An early end cancels what the engine still computes. Raises what a request is refused with or fails with.
    """
    kind = ProjectionReadout((Vector(values=torch.stack(list(directions.values()))),))
    readout = Readout(kind, site, layers=tuple(directions), scope=_ALL_BUT_THE_FIRST)
    program = bind(Program(readouts=(readout,)), info)
    requests = (partial(_request, tokens, program) for tokens in examples)
    async with aclosing(completed(engine, requests)) as finished:
        async for events in finished:
            found: dict[int, list[float]] = {layer: [] for layer in directions}
            for event in events:
                for value in event.values if isinstance(event, Readouts) else ():
                    found[value.layer].append(value.values[0])
            yield found


def _request(tokens: tuple[int, ...], program: BoundProgram, on_event: OnEvent) -> Request:
    return Request(tokens, on_event, program, stop=StopParams(max_tokens=0), priority=Priority.ANALYSIS)
