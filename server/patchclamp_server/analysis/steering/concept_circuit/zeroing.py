"""What becomes of a direction in held-out scenarios when sets of neurons and heads are zeroed.

    projection    mean over scenarios of the mean h · d / |d| of the target's texts
    separation    c(h) · d / |d|: the target's texts less the mean of all values (scenarios.py)

h is the state at the best layer, at the tokens that stand for the text when nothing is zeroed. The projection has an
offset that all texts share; what a set does to it may be nothing to the concept. The separation has none.
"""

from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from patchclamp_server.analysis.progress import Progress, Steps
from patchclamp_server.analysis.requests import Make, OnEvent, completed
from patchclamp_server.analysis.steering.concept_circuit.scenarios import Scenarios, ScenarioText
from patchclamp_server.engine.engine import Engine
from patchclamp_server.engine.reducers.weighted_means import WeightedMeans
from patchclamp_server.engine.request import Priority, Reduction, Request, StopParams
from patchclamp_server.interventions.bound import BoundProgram
from patchclamp_server.model.arrays import BoolArray
from patchclamp_server.model.sites import Site


@dataclass(frozen=True)
class Measured:
    projection: float
    separation: float


@dataclass(frozen=True)
class ZeroedSets:
    """Of the sets of the circuit, and of each random set of equal size."""

    projection: float
    separation: float
    random_projections: tuple[float, ...]
    random_separations: tuple[float, ...]

    @classmethod
    def of(cls, own: Measured, random: Sequence[Measured]) -> "ZeroedSets":
        return cls(
            own.projection,
            own.separation,
            tuple(each.projection for each in random),
            tuple(each.separation for each in random),
        )


async def measured(
    engine: Engine,
    scenarios: Scenarios,
    heldout: Sequence[int],
    chosen: Sequence[BoolArray],
    direction: tuple[Site, int, Tensor],
    programs: Sequence[BoundProgram | None],
) -> AsyncGenerator[Progress | tuple[Measured, ...], None]:
    """Yields progress in texts of all programs, stage "zeroing", then what is measured under each program.

    `direction`: with its site and layer. `chosen`: of every text a mask of the tokens that stand for it.
    """
    site, layer, vector = direction
    texts = scenarios.of(heldout)
    weights = torch.stack((scenarios.target_mean(heldout), scenarios.contrast(heldout)), dim=1)
    reducers = [WeightedMeans((layer,), chosen, weights) for _ in programs]
    makes: list[Make] = [
        partial(text_request, scenarios.texts[i], (Reduction(site, reducer, i),), program)
        for program, reducer in zip(programs, reducers, strict=True)
        for i in texts
    ]
    steps = Steps("zeroing", len(makes))
    async with aclosing(completed(engine, makes)) as finished:
        async for _ in finished:
            yield steps.advance()
    unit = torch.nn.functional.normalize(vector.double(), dim=0)
    yield tuple(Measured(*(reducer.sums(layer) @ unit).tolist()) for reducer in reducers)


def text_request(
    text: ScenarioText, reductions: tuple[Reduction, ...], program: BoundProgram | None, on_event: OnEvent
) -> Request:
    stop = StopParams(max_tokens=0)
    roles, priority = text.roles, Priority.ANALYSIS
    return Request(text.ids, on_event, program, stop=stop, priority=priority, roles=roles, reductions=reductions)
