"""k-sparse probes over all layers, and of each layer where that is asked for; the set has those of the best probe."""

import asyncio
from collections.abc import AsyncGenerator
from typing import Any

import torch
from torch import Tensor

from patchclamp_server.analysis.neurons.localize.methods import (
    Beside,
    Localization,
    ProbeReport,
    Scored,
    SparseProbes,
)
from patchclamp_server.analysis.neurons.localize.pooled import Part, PooledTexts
from patchclamp_server.analysis.neurons.localize.sparse_probe import Kinds, fit, ranked
from patchclamp_server.analysis.neurons.random_sets import random_sets
from patchclamp_server.analysis.progress import Progress, Steps
from patchclamp_server.artifacts.neuron_sets import Neuron, NeuronSet
from patchclamp_server.model.sites import Site


async def probes(
    texts: PooledTexts, method: SparseProbes, job: Localization
) -> AsyncGenerator[Progress | tuple[Scored, dict[str, Any]], None]:
    """Yields progress in probes, then scores, which are the sizes of the weights of the best probe over all layers.

    The best: the one with the largest held-out F1, of equal ones the smallest. Random probes have as many neurons in
    each layer.
    """
    n_layers, d_ff = texts.search.activations.shape[1:]
    rows = {layer: row for row, layer in enumerate(job.layers)}
    kinds: list[int | None] = [None, *(job.layers if method.by_layer else ())]
    every = _kinds(texts.search), _kinds(texts.heldout)
    steps, reports = Steps("probes", len(kinds) * len(method.k)), list[ProbeReport]()
    for layer in kinds:
        first = 0 if layer is None else rows[layer] * d_ff
        ranking = _kinds(texts.search, None if layer is None else rows[layer])
        order = first + await asyncio.to_thread(ranked, method.ranker, ranking, job.seed)
        for k in method.k:
            units = order[:k].tolist()
            neurons = tuple(Neuron(job.layers[unit // d_ff], unit % d_ff) for unit in units)
            own = await asyncio.to_thread(fit, *every, units, job.seed)
            random = []
            for drawn in random_sets(NeuronSet(neurons), d_ff, job.random_sets, job.seed):
                others = [rows[n.layer] * d_ff + n.neuron for n in drawn]
                random.append((await asyncio.to_thread(fit, *every, others, job.seed)).f1)
            reports.append(ProbeReport(k, layer, own, tuple(random), neurons))
            yield steps.advance()
    best = max((report for report in reports if report.layer is None), key=lambda report: (report.probe.f1, -report.k))
    scores = torch.full((n_layers, d_ff), -torch.inf)
    for neuron, weight in zip(best.neurons, best.probe.weights, strict=True):
        scores[rows[neuron.layer], neuron.neuron] = abs(weight)
    label = method.texts.corpus.labels[method.target]
    values = texts.search.mean() if job.site is Site.MLP_POST else None
    judged = Beside(best.probe.f1, best.random_f1)
    yield Scored(label, scores, "F1 of the probe", judged, best.k, values), {"probes": tuple(reports)}


def _kinds(part: Part, row: int | None = None) -> Kinds:
    """The texts of a part at all layers, or at one."""
    flat: Tensor = part.activations.flatten(1) if row is None else part.activations[:, row]
    return Kinds(flat.numpy(), part.is_target.numpy())
