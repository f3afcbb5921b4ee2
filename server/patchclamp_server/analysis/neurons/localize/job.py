"""One localisation: texts or facts → scores of all neurons → the best as a stored set, judged beside random sets.

    heldout   mean of a measure over the neurons of the set, on what was held out
    random    the same over random sets with as many neurons in each layer

The measure is that of the method (average precision, t, share of tokens), on other texts than those of the search.
What an edit of the set does is another question, which EvaluateNeuronEdit answers.
"""

import asyncio
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from typing import Any

import torch
from torch import Tensor

from patchclamp_server.analysis.neurons.localize.by_facts import by_facts
from patchclamp_server.analysis.neurons.localize.by_labels import by_entropy
from patchclamp_server.analysis.neurons.localize.by_texts import by_texts
from patchclamp_server.analysis.neurons.localize.methods import (
    ActivationEntropy,
    Gradients,
    Judged,
    Localization,
    Localized,
    Scored,
)
from patchclamp_server.analysis.neurons.random_sets import random_sets
from patchclamp_server.analysis.neurons.stored import best_of, store_neurons
from patchclamp_server.analysis.progress import Progress
from patchclamp_server.artifacts.neuron_sets import Neuron
from patchclamp_server.artifacts.store import ArtifactStore
from patchclamp_server.artifacts.types import Tags
from patchclamp_server.engine.engine import Engine
from patchclamp_server.errors import FailedPrecondition, InvalidArgument
from patchclamp_server.model.info import ModelInfo
from patchclamp_server.text.prompt import PromptEncoder


async def localize(
    engine: Engine, store: ArtifactStore, info: ModelInfo, prompts: PromptEncoder, job: Localization
) -> AsyncGenerator[Progress | Localized, None]:
    """Yields progress, then what was found. Ending the iteration early cancels what the engine still computes.

    Raises InvalidArgument (field path), and FailedPrecondition where no neuron passes the method's own bounds.
    """
    method = job.method
    if isinstance(method, Gradients):
        found = by_facts(engine, method, job)
    elif isinstance(method, ActivationEntropy):
        found = by_entropy(engine, prompts, method, job)
    else:
        found = by_texts(engine, prompts, method, job)
    async with aclosing(found) as events:
        async for event in events:
            if isinstance(event, Progress):
                yield event
                continue
            scored, result = event
            sets = []
            for each in scored:
                tags = _tags(job.tags, each.label, several=len(scored) > 1)
                sets.append(await asyncio.to_thread(_judged, store, info, job, each, tags))
            yield Localized(tuple(sets), **result)


def _judged(store: ArtifactStore, info: ModelInfo, job: Localization, scored: Scored, tags: Tags) -> Judged:
    found = best_of(scored.scores, job.layers, scored.size, scored.values)
    if not found.neurons:
        of = f" for {scored.label!r}" if scored.label else ""
        raise FailedPrecondition("", f"no neuron passes the bounds of the method{of}; loosen them")
    rows = {layer: row for row, layer in enumerate(job.layers)}

    def mean(neurons: Sequence[Neuron]) -> float:
        values = torch.stack([scored.heldout[rows[n.layer], n.neuron] for n in neurons])
        return float(values.double().mean())

    random = tuple(map(mean, _random(found, info, job)))
    heldout = mean(found.neurons)
    finite = scored.scores.masked_fill(scored.scores == -torch.inf, 0.0)
    layer_mean, layer_max = _floats(finite.mean(1)), _floats(finite.amax(1))
    evidence: dict[str, Any] = {
        "measure": scored.measure,
        "heldout": heldout,
        "random": {"mean": _mean(random), "max": max(random, default=0.0), "sets": len(random)},
        "layers": [
            {"layer": layer, "mean": mean_, "max": max_}
            for layer, mean_, max_ in zip(job.layers, layer_mean, layer_max, strict=True)
        ],
    }
    parameters = {
        "layers": list(job.layers),
        "site": job.site.value,
        "label": scored.label,
        "holdout_fraction": job.holdout_fraction,
        # As text: JSON and google.protobuf.Struct keep numbers as doubles, and a seed has 64 bits.
        "seed": str(job.seed),
    }
    stored = store_neurons(
        store,
        info,
        found,
        provenance={"method": job.name, "parameters": parameters},
        evidence=evidence,
        description=job.description,
        tags=tags,
    )
    return Judged(scored.label, stored, scored.measure, heldout, random, layer_mean, layer_max)


def _random(found: Any, info: ModelInfo, job: Localization) -> Sequence[Sequence[Neuron]]:
    try:
        return random_sets(found, info.d_ff, job.random_sets, job.seed)
    except InvalidArgument as error:
        message = f"{error.message}: the set leaves none to compare it with; ask for fewer"
        raise FailedPrecondition("", message) from error


def _tags(tags: Tags, label: str, *, several: bool) -> Tags:
    """Returns the tags of the set of a label: "<tag>-<label>" where there are several."""
    return Tags(tuple(f"{name}-{label}" for name in tags.names), tags.replace) if several else tags


def _floats(values: Tensor) -> tuple[float, ...]:
    return tuple(values.double().tolist())


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values) if values else 0.0
