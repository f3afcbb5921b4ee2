"""Methods that compare pooled activations of texts of two kinds: scores of all neurons, on both parts of the texts."""

import asyncio
from collections.abc import AsyncGenerator, Callable
from contextlib import aclosing
from functools import partial
from typing import Any, TypeAlias

import torch
from torch import Tensor

from patchclamp_server.analysis.neurons.localize import average_precision, contrast_set, welch_t
from patchclamp_server.analysis.neurons.localize.methods import (
    AveragePrecision,
    ContrastSet,
    Localization,
    Scored,
    SparseProbes,
    WelchT,
)
from patchclamp_server.analysis.neurons.localize.pooled import Comparison, Part, PooledTexts, pooled_texts
from patchclamp_server.analysis.neurons.localize.probes import probes
from patchclamp_server.analysis.progress import Progress
from patchclamp_server.engine.engine import Engine
from patchclamp_server.engine.request import Capture
from patchclamp_server.model.sites import Site
from patchclamp_server.text.prompt import PromptEncoder

Scoring: TypeAlias = AveragePrecision | WelchT | ContrastSet
Found: TypeAlias = tuple[list[Scored], dict[str, Any]]
# activations [texts, units], is_target [texts] -> scores [units]
Scorer: TypeAlias = Callable[[Tensor, Tensor], Tensor]
AVERAGE_PRECISION_NEURONS = 3000
MEASURES = {AveragePrecision: "average precision", WelchT: "Welch's t", ContrastSet: "Welch's t"}


async def by_texts(
    engine: Engine, prompts: PromptEncoder, method: Scoring | SparseProbes, job: Localization
) -> AsyncGenerator[Progress | Found, None]:
    """Yields progress, then scores for the target label and the fields of Localized beside the sets."""
    contrast = method.contrast if isinstance(method, WelchT | ContrastSet) else None
    documents = 2 * method.subsets if isinstance(method, ContrastSet) else 2
    compared = Comparison(method.target, contrast, job.holdout_fraction, job.seed, documents)
    capture = Capture(job.site, job.layers, method.pooling)
    texts = pooled_texts(engine, prompts, method.texts, capture, compared, f"{job.name}.texts")
    async with aclosing(texts) as events:
        async for event in events:
            if isinstance(event, Progress):
                yield event
                continue
            found = probes(event, method, job) if isinstance(method, SparseProbes) else _scored(event, method, job)
            async with aclosing(found) as told:
                async for each in told:
                    yield each if isinstance(each, Progress) else _found(event, *each)


def _found(texts: PooledTexts, scored: Scored, fields: dict[str, Any]) -> Found:
    return [scored], {"texts": texts.texts, "tokens": texts.tokens, **fields}


async def _scored(
    texts: PooledTexts, method: Scoring, job: Localization
) -> AsyncGenerator[Progress | tuple[Scored, dict[str, Any]], None]:
    """Yields progress in layers, then the scores of all neurons."""
    scores, heldout = list[Tensor](), list[Tensor]()
    for row in range(len(job.layers)):
        scores.append(await asyncio.to_thread(_search, texts.search, row, method, job.seed))
        heldout.append(await asyncio.to_thread(_judge(method), *_layer(texts.heldout, row)))
        yield Progress("scores", row + 1, len(job.layers))
    found = torch.stack(scores)
    # An edit sets neurons of mlp_post: values of another site are none for it.
    values = texts.search.mean() if job.site is Site.MLP_POST else None
    name = method.texts.corpus.labels[method.target]
    size = job.size or _default_size(method, found.numel())
    yield Scored(name, found, MEASURES[type(method)], torch.stack(heldout), size, values), {}


def _search(part: Part, row: int, method: Scoring, seed: int) -> Tensor:
    x, is_target = _layer(part, row)
    if not isinstance(method, ContrastSet):
        return _judge(method)(x, is_target)
    scorer = partial(contrast_set.scores, z=method.z, subsets=method.subsets, agreement=method.agreement, seed=seed)
    return scorer(x, is_target, part.documents)


def _judge(method: Scoring) -> Scorer:
    return average_precision.scores if isinstance(method, AveragePrecision) else welch_t.scores


def _layer(part: Part, row: int) -> tuple[Tensor, Tensor]:
    return part.activations[:, row], part.is_target


def _default_size(method: Scoring, units: int) -> int:
    if isinstance(method, ContrastSet):
        return units
    share = max(1, units // 100)
    return min(share, AVERAGE_PRECISION_NEURONS) if isinstance(method, AveragePrecision) else share
