"""How a vector is applied at a strength s, one layer at a time, and the strengths that are tried where none are named.

    add              h + s v
    rotate_towards   h turned towards v by s radians
    replace          h + s (v - h)

By default the change |delta| is 0.1 to 2 times the mean norm N of the activations, each step by the same factor:
s = r N / |v| of add, and s = 2 arcsin(r / 2) of a rotation, whose chord is r N. A replacement is done by an eighth, two
eighths and so on to the whole.
"""

import math
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from functools import partial
from typing import TypeAlias

from torch import Tensor

from patchclamp_server.analysis.requests import OnEvent, completed
from patchclamp_server.engine.engine import Engine
from patchclamp_server.engine.reducers.pooled_text import PooledText
from patchclamp_server.engine.request import Priority, Reduction, Request, StopParams
from patchclamp_server.interventions.bind import bind
from patchclamp_server.interventions.bound import BoundProgram
from patchclamp_server.interventions.pooling import Pooling
from patchclamp_server.interventions.program import (
    AddVector,
    Edit,
    EditKind,
    Program,
    ReplaceVector,
    RotateTowards,
    Scope,
    Vector,
)
from patchclamp_server.interventions.safe_strengths import Application
from patchclamp_server.model.info import ModelInfo
from patchclamp_server.model.sites import Site

Ids: TypeAlias = tuple[int, ...]
STEPS = 8
LEAST_CHANGE, MOST_CHANGE = 0.1, 2.0


def steering_program(
    application: Application, v: Tensor, strength: float, site: Site, layer: int, scope: Scope, info: ModelInfo
) -> BoundProgram:
    vector = Vector(values=v)
    kind: EditKind
    match application:
        case Application.ADD:
            kind = AddVector(vector)
        case Application.REPLACE:
            kind = ReplaceVector(vector)
        case Application.ROTATE_TOWARDS:
            kind, strength = RotateTowards(vector, strength), 1.0
    return bind(Program((Edit(kind, site, layers=(layer,), strength=strength, scope=scope),)), info)


def default_strengths(application: Application, vector_norm: float, activation_norm: float) -> tuple[float, ...]:
    """Returns STEPS strengths, ascending, to three digits."""
    ratios = [LEAST_CHANGE * (MOST_CHANGE / LEAST_CHANGE) ** (i / (STEPS - 1)) for i in range(STEPS)]
    match application:
        case Application.ADD:
            found = [ratio * activation_norm / vector_norm for ratio in ratios]
        case Application.ROTATE_TOWARDS:
            found = [2.0 * math.asin(min(1.0, ratio / 2.0)) for ratio in ratios]
        case Application.REPLACE:
            found = [(i + 1) / STEPS for i in range(STEPS)]
    # Rounding must not turn further than round.
    return tuple(min(float(f"{s:.3g}"), s if application is Application.ROTATE_TOWARDS else math.inf) for s in found)


async def activation_norms(
    engine: Engine, site: Site, layers: tuple[int, ...], prompts: Sequence[Ids]
) -> AsyncGenerator[int | dict[int, float], None]:
    """Yields 1 for each prompt that has run, then the mean norm by layer of their tokens, without attention sinks."""
    readers = [
        PooledText(layers, len(ids), (Pooling.MEAN,), lambda _, rows: rows.norm(dim=1, keepdim=True)) for ids in prompts
    ]
    makes = [partial(_reading, ids, Reduction(site, reader)) for ids, reader in zip(prompts, readers, strict=True)]
    async with aclosing(completed(engine, makes)) as finished:
        async for _ in finished:
            yield 1
    norms: dict[int, float] = {}
    for layer in layers:
        found = [reader.pooled(layer, Pooling.MEAN) for reader in readers]
        norms[layer] = sum(float(mean[0]) * n for mean, n in found) / sum(n for _, n in found)
    yield norms


def _reading(ids: Ids, reduction: Reduction, on_event: OnEvent) -> Request:
    stop = StopParams(max_tokens=0)
    return Request(ids, on_event, stop=stop, priority=Priority.ANALYSIS, reductions=(reduction,))
