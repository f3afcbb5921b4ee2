"""One localisation: texts or facts → scores of all neurons → the best as a stored set, judged beside random sets.

    heldout   mean of a measure over the neurons of the set, on what was held out; of a probe its F1
    random    the same over random sets with as many neurons in each layer

The measure is that of the method (average precision, t, share of tokens), on other texts than those of the search.
What an edit of the set does is another question, which EvaluateNeuronEdit answers.
"""

import asyncio
from collections.abc import AsyncGenerator
from contextlib import aclosing
from statistics import fmean
from typing import Any

import numpy as np
import torch
from torch import Tensor

from patchclamp_server.analysis.neurons.localize.by_facts import by_facts
from patchclamp_server.analysis.neurons.localize.by_labels import by_entropy
from patchclamp_server.analysis.neurons.localize.by_texts import by_texts
from patchclamp_server.analysis.neurons.localize.methods import (
    ActivationEntropy,
    Beside,
    Gradients,
    Judged,
    Localization,
    Localized,
    Scored,
)
from patchclamp_server.analysis.neurons.random_sets import draws
from patchclamp_server.analysis.neurons.stored import best_of, store_neurons
from patchclamp_server.analysis.progress import Progress
from patchclamp_server.artifacts.neuron_sets import NeuronSet
from patchclamp_server.artifacts.store import ArtifactStore
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
            # All are judged before the first is stored.
            judged = [await asyncio.to_thread(_judged, info, job, each) for each in scored]
            sets = [
                await asyncio.to_thread(_stored, store, info, job, *each) for each in zip(scored, judged, strict=True)
            ]
            ties = [_told_ties(each, found) for each, (found, _) in zip(scored, judged, strict=True)]
            warnings = (*result.pop("warnings", ()), *(told for told in ties if told))
            yield Localized(tuple(sets), **result, warnings=warnings)


def _judged(info: ModelInfo, job: Localization, scored: Scored) -> tuple[NeuronSet, Beside]:
    """Returns the best neurons and what they are judged by, beside random sets."""
    found = best_of(scored.scores, job.layers, scored.size, scored.values)
    if not found.neurons:
        of = f" for {scored.label!r:.80}" if scored.label else ""
        raise FailedPrecondition(job.name, f"no neuron passes the bounds of the method{of}; loosen them")
    if isinstance(scored.judged, Beside):
        return found, scored.judged
    measured = scored.judged.double().numpy()
    rows = {layer: row for row, layer in enumerate(job.layers)}
    own = float(np.mean([measured[rows[n.layer], n.neuron] for n in found.neurons]))
    totals = np.zeros(job.random_sets)
    try:
        for layer, i, drawn in draws(found, info.d_ff, job.random_sets, job.seed):
            totals[i] += measured[rows[layer], drawn].sum()
    except InvalidArgument as error:
        message = f"{error.message}: the set leaves none to compare it with; ask for fewer"
        raise FailedPrecondition("size", message) from error
    return found, Beside(own, tuple((totals / len(found.neurons)).tolist()))


def _told_ties(scored: Scored, found: NeuronSet) -> str:
    """Says where at least half of a set was chosen among neurons of one score by nothing but their place; else ""."""
    assert found.scores is not None
    last = found.scores[-1]
    inside = int((found.scores == last).sum())
    left_out = int((scored.scores.float() == last).sum()) - inside
    if not left_out or 2 * inside < len(found.neurons):
        return ""
    of = f"of {scored.label!r:.80}, " if scored.label else ""
    return (
        f"{of}{inside} of the {len(found.neurons)} neurons of the set share the score {last:.4g} with {left_out} "
        "that are not in it: those of lower layers were taken; more texts would tell them apart"
    )


def _stored(
    store: ArtifactStore, info: ModelInfo, job: Localization, scored: Scored, judged: tuple[NeuronSet, Beside]
) -> Judged:
    found, beside = judged
    layer_mean, layer_max = _by_layer(scored.scores)
    random = {"mean": fmean(beside.random), "max": max(beside.random), "sets": len(beside.random)}
    evidence: dict[str, Any] = {
        "measure": scored.measure,
        "heldout": beside.heldout,
        "random": random,
        "layers": [
            {"layer": layer, "mean": mean, "max": largest}
            for layer, mean, largest in zip(job.layers, layer_mean, layer_max, strict=True)
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
        tags=job.tags_of(scored.label),
    )
    return Judged(scored.label, stored, scored.measure, beside.heldout, beside.random, layer_mean, layer_max)


def _by_layer(scores: Tensor) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Returns the mean and the largest of the scores of each layer; 0 where none has a score."""
    own = [row[row != -torch.inf].double() for row in scores]
    means = tuple(float(row.mean()) if len(row) else 0.0 for row in own)
    return means, tuple(float(row.max()) if len(row) else 0.0 for row in own)
