"""What an edit of growing fractions of a neuron set changes, beside the same edit of random sets of equal size.

    change(f) = metric with the best f · n neurons edited - metric of the unedited model        for targets and sides
    beyond(f) = change(f) - mean change of random sets with as many neurons in each layer

A set that matters changes its targets by more than random ones do, more with every fraction (cumulativity), and leaves
the sides as they are (selectivity). Metrics: edit_tests.py; intervals: intervals.py. Every set at every fraction is a
group of ordinary low-priority requests of one batch.
"""

import asyncio
import random as random_module
from collections.abc import AsyncGenerator
from contextlib import aclosing
from dataclasses import dataclass, field, replace

import torch

from patchclamp_server.analysis.activations import mean_activations
from patchclamp_server.analysis.neurons.edit_tests import Measured, Metric, Test, transform
from patchclamp_server.analysis.neurons.edits import (
    EditValues,
    NeuronEditMode,
    edit_values,
    neuron_program,
)
from patchclamp_server.analysis.neurons.intervals import Change, change_of
from patchclamp_server.analysis.neurons.random_sets import random_sets
from patchclamp_server.analysis.ordinary_text import windows
from patchclamp_server.analysis.progress import Progress, Steps
from patchclamp_server.artifacts.neuron_sets import Neuron, NeuronSelection, NeuronSet, select
from patchclamp_server.artifacts.store import ArtifactStore
from patchclamp_server.engine.engine import Engine
from patchclamp_server.errors import InvalidArgument, fields_as
from patchclamp_server.interventions.bound import BoundProgram
from patchclamp_server.interventions.program import Scope
from patchclamp_server.model.info import ModelInfo
from patchclamp_server.model.sites import Site
from patchclamp_server.text.prompt import PromptEncoder

# Of all tests, fractions and sets.
MAX_REQUESTS = 200_000
DEFAULT_FRACTIONS = (0.1, 0.25, 0.5, 1.0)


@dataclass(frozen=True, eq=False)
class Evaluation:
    """What to evaluate. Without `mean_texts`, the mode MEAN takes the built-in ones. Names of tests are unique."""

    neurons: NeuronSelection
    mode: NeuronEditMode
    targets: tuple[Test, ...]
    sides: tuple[Test, ...] = ()
    value: float | None = None
    fractions: tuple[float, ...] = DEFAULT_FRACTIONS
    random_sets: int = 10
    seed: int = 0
    scope: Scope = field(default_factory=Scope)
    mean_texts: tuple[str, ...] = ()


@dataclass(frozen=True)
class Measurement:
    test: str
    side: bool
    metric: Metric
    change: Change


@dataclass(frozen=True)
class EditPoint:
    """All tests at one fraction, of so many neurons."""

    fraction: float
    neurons: int
    measurements: tuple[Measurement, ...]


@dataclass(frozen=True)
class EditEffect:
    """`neurons`: in the order in which fractions take them."""

    points: tuple[EditPoint, ...]
    neurons: tuple[Neuron, ...]


async def evaluate_edit(
    engine: Engine, store: ArtifactStore, info: ModelInfo, prompts: PromptEncoder, job: Evaluation
) -> AsyncGenerator[Progress | EditPoint | EditEffect, None]:
    """Yields progress in requests, each point when it is measured, then the effect.

    Ending the iteration early cancels what the engine still computes. Raises InvalidArgument (field path), and NotFound
    or FailedPrecondition for the neuron set.
    """
    found = _ordered(await asyncio.to_thread(select, job.neurons, store, info, "neurons"), job.seed)
    means = None
    if job.mode is NeuronEditMode.MEAN:
        with fields_as(lambda name: f"mean_{name}" if name else name):
            texts = await prompts.analysis.run(windows, job.mean_texts, prompts, info.context_length)
        means = await mean_activations(engine, Site.MLP_POST, texts)
    values = edit_values(found, job.mode, job.value, means)
    drawn = random_sets(found, info.d_ff, job.random_sets, job.seed)
    tests = [(test, False) for test in job.targets] + [(test, True) for test in job.sides]
    n_programs = len(job.fractions) * (2 + job.random_sets)
    steps = Steps("edits", n_programs * sum(test.requests for test, _ in tests))
    if steps.total > MAX_REQUESTS:
        message = f"the tests of all sets and fractions are {steps.total} requests; at most {MAX_REQUESTS} are run"
        raise InvalidArgument("random_sets", message)
    points: list[EditPoint] = []
    for fraction in job.fractions:
        n = max(1, round(fraction * len(found.neurons)))
        programs = _programs([found.neurons[:n], *(each[:n] for each in drawn)], values, job.scope, info)
        measurements: list[Measurement] = []
        for test, side in tests:
            async with aclosing(test.measure(engine, [None, *programs])) as measured:
                async for event in measured:
                    if isinstance(event, int):
                        yield steps.advance(event)
                    else:
                        measurements += _measurements(test.name, side, event, job.seed)
        points.append(EditPoint(fraction, n, tuple(measurements)))
        yield points[-1]
    yield EditEffect(tuple(points), found.neurons)


def _ordered(found: NeuronSet, seed: int) -> NeuronSet:
    """Returns the best first, or a set without scores in a seeded order: a fraction of it is a fair sample."""
    if found.scores is not None:
        return found
    order = list(range(len(found.neurons)))
    random_module.Random(seed).shuffle(order)
    values = None if found.values is None else found.values[torch.tensor(order)]
    return replace(found, neurons=tuple(found.neurons[i] for i in order), values=values)


def _programs(sets: list[tuple[Neuron, ...]], values: EditValues, scope: Scope, info: ModelInfo) -> list[BoundProgram]:
    return [neuron_program(neurons, values, scope, info) for neurons in sets]


def _measurements(test: str, side: bool, measured: list[Measured], seed: int) -> list[Measurement]:
    """Of the unedited model, the set, and the random sets, in this order."""
    unedited, edited, *random = measured
    return [
        Measurement(
            test,
            side,
            metric,
            change_of(unedited[metric], edited[metric], [r[metric] for r in random], transform(metric), seed),
        )
        for metric in unedited
    ]
