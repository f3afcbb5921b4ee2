"""Collects pooled activations of many prompts through the engine, as low-priority requests of one continuous batch."""

from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from functools import partial
from itertools import repeat
from typing import TypeAlias

import torch
from torch import Tensor

from patchclamp_server.analysis.requests import OnEvent, completed
from patchclamp_server.engine.engine import Engine
from patchclamp_server.engine.request import Capture, Captured, Priority, Request, StopParams
from patchclamp_server.interventions.pooling import Pooled, Pooling
from patchclamp_server.model.sites import Site

MAX_IN_FLIGHT = 64
Roles: TypeAlias = tuple[str, ...] | None


async def collect(
    engine: Engine,
    prompts: Sequence[tuple[int, ...]],
    capture: Capture,
    *,
    roles: Sequence[Roles] | None = None,
    max_in_flight: int = MAX_IN_FLIGHT,
) -> AsyncGenerator[tuple[int, Pooled], None]:
    """Yields (index of the prompt, its pooled activations on the CPU) in order; otherwise it is as `completed`.

    `roles` of the tokens of each prompt, for scopes that name them. Raises InvalidArgument on "capture.scope" where it
    selects no token of a prompt.
    """
    each = zip(prompts, roles or repeat(None), strict=False)
    requests = (partial(_request, tokens, own, capture) for tokens, own in each)
    async with aclosing(completed(engine, requests, max_in_flight=max_in_flight)) as finished:
        index = 0
        async for events in finished:
            (pooled,) = (event.pooled for event in events if isinstance(event, Captured))
            yield index, pooled.cpu()
            index += 1


async def mean_activations(engine: Engine, site: Site, windows: Sequence[tuple[int, ...]]) -> Tensor:
    """Returns the mean [n_layers, width] of every unit of a site, over the tokens of all windows that pooling.py takes
    for ordinary."""
    info = engine.model.info
    capture = Capture(site, tuple(range(info.n_layers)), Pooling.MEAN)
    total, tokens = torch.zeros(info.n_layers, info.sites[site]), torch.zeros(info.n_layers, dtype=torch.int64)
    async with aclosing(collect(engine, windows, capture)) as collected:
        async for _, pooled in collected:
            total += pooled.tokens[:, None] * pooled.values
            tokens += pooled.tokens
    return total / tokens[:, None]


def _request(tokens: tuple[int, ...], roles: Roles, capture: Capture, on_event: OnEvent) -> Request:
    stop = StopParams(max_tokens=0)
    return Request(tokens, on_event, stop=stop, priority=Priority.ANALYSIS, roles=roles, capture=capture)
