"""What neurons stand for: the contexts in which they are largest (contexts.py), and how well descriptions fit them
(description_scores.py).

Random neurons of a causal score are drawn once for each layer, from those that are not described.
"""

import asyncio
from collections.abc import AsyncGenerator
from contextlib import aclosing
from dataclasses import dataclass

import numpy as np

from patchclamp_server.analysis.neurons.contexts import (
    Activity,
    NeuronContext,
    Recording,
    contexts_of,
    record,
)
from patchclamp_server.analysis.neurons.description_scores import (
    Described,
    Description,
    DescriptionScore,
    DescriptionScorer,
)
from patchclamp_server.analysis.neurons.texts import TextSource
from patchclamp_server.analysis.progress import Progress, Steps
from patchclamp_server.artifacts.neuron_sets import Neuron, NeuronSelection, NeuronSet, select
from patchclamp_server.artifacts.store import ArtifactStore
from patchclamp_server.engine.engine import Engine
from patchclamp_server.errors import InvalidArgument
from patchclamp_server.model.info import ModelInfo
from patchclamp_server.model.sites import Site
from patchclamp_server.text.prompt import PromptEncoder

MAX_NEURONS = 1000
# Of the contexts of all neurons, which are kept until the last is scored.
MAX_CONTEXT_TOKENS = 1 << 22
MAX_REQUESTS = 200_000


@dataclass(frozen=True, eq=False)
class Describing:
    """`contexts` of each neuron, with `context_tokens` before and after the largest token."""

    neurons: NeuronSelection
    texts: TextSource
    site: Site = Site.MLP_POST
    contexts: int = 10
    context_tokens: int = 12
    descriptions: tuple[Description, ...] = ()
    causal: bool = False
    random_neurons: int = 20
    seed: int = 0


@dataclass(frozen=True, eq=False)
class NeuronDescription:
    neuron: Neuron
    activity: Activity
    contexts: tuple[NeuronContext, ...]
    scores: tuple[DescriptionScore, ...] = ()


async def describe_neurons(
    engine: Engine, store: ArtifactStore, info: ModelInfo, prompts: PromptEncoder, job: Describing
) -> AsyncGenerator[Progress | NeuronDescription, None]:
    """Yields progress, and each neuron once its scores are there. Ending the iteration early leaves nothing in the
    engine.

    Raises InvalidArgument (field path), and NotFound or FailedPrecondition for the neuron set.
    """
    chosen = await asyncio.to_thread(select, job.neurons, store, info, "neurons")
    _check(chosen, job)
    random = _random_neurons(chosen, info, job) if job.causal else {}
    scorer, steps = None, Steps("scores", 0)
    if job.descriptions:
        scorer = await prompts.analysis.run(DescriptionScorer, prompts, info, job.descriptions)
        steps.total = scorer.requests(len(chosen.neurons), sum(map(len, random.values())), job.causal)
        if steps.total > MAX_REQUESTS:
            message = f"the scores of all neurons are {steps.total} requests; at most {MAX_REQUESTS} are run"
            raise InvalidArgument("descriptions", message)
    others = tuple(neuron for own in random.values() for neuron in own)
    recording = Recording(job.texts, job.site, chosen.neurons, job.contexts, others)
    recorded = None
    async with aclosing(record(engine, prompts, recording)) as events:
        async for event in events:
            if isinstance(event, Progress):
                yield event
            else:
                recorded = event
    assert recorded is not None
    contexts: dict[Neuron, tuple[NeuronContext, ...]] = {}
    async with aclosing(contexts_of(engine, prompts, recording, recorded, job.context_tokens)) as found:
        async for each in found:
            if isinstance(each, Progress):
                yield each
            else:
                contexts = each
    activities = recorded.activities
    if scorer is None:
        for neuron in chosen.neurons:
            yield NeuronDescription(neuron, activities[neuron], contexts[neuron])
        return
    described = [Described(n, contexts[n], activities[n].max if job.causal else None) for n in chosen.neurons]
    clamped = {layer: {n: recorded.largest[n] for n in own} for layer, own in random.items()}
    waiting = iter(described)
    async with aclosing(scorer.scores(engine, described, clamped, job.site)) as scored:
        async for outcome in scored:
            if isinstance(outcome, int):
                yield steps.advance(outcome)
            else:
                own = next(waiting)
                yield NeuronDescription(own.neuron, activities[own.neuron], own.contexts, outcome)


def _check(chosen: NeuronSet, job: Describing) -> None:
    n = len(chosen.neurons)
    if n > MAX_NEURONS:
        raise InvalidArgument("neurons", f"names {n} neurons; expected at most {MAX_NEURONS}")
    tokens = n * job.contexts * (2 * job.context_tokens + 1)
    if tokens > MAX_CONTEXT_TOKENS:
        message = f"those of all neurons may have {tokens} tokens; at most {MAX_CONTEXT_TOKENS} are kept"
        raise InvalidArgument("contexts", message)


def _random_neurons(chosen: NeuronSet, info: ModelInfo, job: Describing) -> dict[int, tuple[Neuron, ...]]:
    generator = np.random.default_rng(job.seed)
    found: dict[int, tuple[Neuron, ...]] = {}
    for layer, places in chosen.by_layer().items():
        own = [chosen.neurons[place].neuron for place in places.tolist()]
        others = np.setdiff1d(np.arange(info.d_ff), own)
        if job.random_neurons > len(others):
            message = f"layer {layer} has {len(others)} neurons that are not described; expected no more"
            raise InvalidArgument("random_neurons", message)
        drawn = generator.choice(others, job.random_neurons, replace=False)
        found[layer] = tuple(Neuron(layer, index) for index in drawn.tolist())
    return found
