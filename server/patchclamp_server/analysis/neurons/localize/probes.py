"""k-sparse probes over all layers, and of each layer where that is asked for; the set has those of the best probe."""

import asyncio
from collections.abc import AsyncGenerator
from typing import Any

import numpy as np
import torch

from patchclamp_server.analysis.neurons.localize.methods import Localization, ProbeReport, Scored, SparseProbes
from patchclamp_server.analysis.neurons.localize.pooled import PooledTexts
from patchclamp_server.analysis.neurons.localize.sparse_probe import Bools, Floats, probe, ranked
from patchclamp_server.analysis.progress import Progress, Steps
from patchclamp_server.artifacts.neuron_sets import Neuron


async def probes(
    texts: PooledTexts, method: SparseProbes, job: Localization
) -> AsyncGenerator[Progress | tuple[list[Scored], dict[str, Any]], None]:
    """Yields progress in probes, then scores, which are the sizes of the weights of the best probe over all layers.

    The best: the one with the largest held-out F1, of equal ones the smallest.
    """
    n_layers, d_ff = texts.activations.shape[1:]
    sizes = [k for k in sorted(set(method.k)) if k <= n_layers * d_ff]
    kinds: list[int | None] = [None, *(range(n_layers) if method.by_layer else ())]
    steps, reports = Steps("probes", len(kinds) * len(sizes)), []
    for row in kinds:
        x, y, heldout = _parts(texts, method, row)
        order = await asyncio.to_thread(ranked, method.ranker, x, y, job.seed)
        generator = np.random.default_rng(job.seed)
        for k in sizes:
            if k > x.shape[1]:
                continue
            random = [generator.choice(x.shape[1], k, replace=False).tolist() for _ in range(job.random_sets)]
            found = await asyncio.to_thread(probe, x, y, heldout, order[:k].tolist(), random, job.seed)
            places = [divmod(unit, d_ff) if row is None else (row, unit) for unit in found.units]
            reports.append(
                ProbeReport(
                    k,
                    None if row is None else job.layers[row],
                    found.f1,
                    found.precision,
                    found.recall,
                    found.random_f1,
                    tuple(Neuron(job.layers[place], unit) for place, unit in places),
                    found.weights,
                    found.intercept,
                )
            )
            yield steps.advance()
    best = max((report for report in reports if report.layer is None), key=lambda report: (report.f1, -report.k))
    scores, heldout_f1 = torch.full((n_layers, d_ff), -torch.inf), torch.zeros(n_layers, d_ff)
    rows = {layer: row for row, layer in enumerate(job.layers)}
    for neuron, weight in zip(best.neurons, best.weights, strict=True):
        scores[rows[neuron.layer], neuron.neuron] = abs(weight)
        heldout_f1[rows[neuron.layer], neuron.neuron] = best.f1
    label = method.texts.corpus.labels[method.target]
    scored = Scored(label, scores, "", heldout_f1, job.size or best.k)
    yield [scored], {"texts": len(texts.labels), "tokens": texts.tokens, "probes": tuple(reports)}


def _parts(texts: PooledTexts, method: SparseProbes, row: int | None) -> tuple[Floats, Bools, tuple[Floats, Bools]]:
    """Returns activations [texts, units] and which are the target's, of the training texts and of those held out."""
    flat = texts.activations.flatten(1) if row is None else texts.activations[:, row]
    is_target = (texts.labels == method.target).numpy()
    out = texts.heldout.numpy()
    x = flat.numpy()
    return x[~out], is_target[~out], (x[out], is_target[out])
