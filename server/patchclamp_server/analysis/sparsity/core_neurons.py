"""The sets that a policy fixes for a prompt, and how much those of two prompts overlap.

J(A, B) = |A and B| / |A or B|,   1 for two empty sets

A prompt is a request of the engine, whose neurons the policy observes as a reducer does.
"""

from collections.abc import Sequence
from contextlib import aclosing
from functools import partial

import torch
from torch import Tensor

from patchclamp_server.analysis.requests import OnEvent, completed
from patchclamp_server.engine.engine import Engine
from patchclamp_server.engine.reducers.reducer import Place, Reducer
from patchclamp_server.engine.request import Priority, Reduction, Request, StopParams
from patchclamp_server.errors import renaming_fields
from patchclamp_server.model.sites import Site
from patchclamp_server.sparsity.policy import Selector


async def core_neurons(engine: Engine, selector: Selector, prompts: Sequence[tuple[int, ...]]) -> list[list[Tensor]]:
    """The neurons int64 [n], ascending, that are computed after each prompt, by layer; all of a layer that is dense.

    Raises what the engine refuses a prompt with.
    """
    observed = [_Observed(selector) for _ in prompts]
    requests = [partial(_request, *asked) for asked in zip(prompts, observed, strict=True)]
    with renaming_fields({"prompt": "prompts"}):
        async with aclosing(completed(engine, requests)) as finished:
            async for _ in finished:
                pass
    return [each.sets() for each in observed]


def _request(prompt: tuple[int, ...], observed: "_Observed", on_event: OnEvent) -> Request:
    return Request(
        prompt,
        on_event,
        stop=StopParams(max_tokens=0),
        priority=Priority.ANALYSIS,
        reductions=(Reduction(Site.MLP_POST, observed),),
    )


class _Observed(Reducer):
    """What a policy knows of one prompt."""

    def __init__(self, selector: Selector) -> None:
        super().__init__(tuple(range(selector.model.n_layers)))
        self._selector, self._state = selector, selector.begin()

    def add(self, layer: int, rows: Tensor, place: Place) -> None:
        self._selector.observe_prompt(self._state, layer, rows)

    def sets(self) -> list[Tensor]:
        """By layer, once the whole prompt has been observed."""
        selector, state = self._selector, self._state
        selector.end_prompt(state)
        sets = []
        for layer in self.layers:
            fixed = None if selector.is_dense(layer) else selector.fixed_set(state, layer)
            everything = torch.arange(selector.model.spec.d_ff)
            sets.append(everything if fixed is None else fixed.nonzero()[:, 0].cpu())
        return sets


def jaccard(first: Tensor, second: Tensor) -> float:
    """Of two sets of distinct neurons."""
    shared = int(torch.isin(first, second).sum())
    union = len(first) + len(second) - shared
    return shared / union if union else 1.0
