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
from patchclamp_server.analysis.neurons.localize.pooled import PooledTexts, pooled_texts
from patchclamp_server.analysis.neurons.localize.probes import probes
from patchclamp_server.analysis.progress import Progress
from patchclamp_server.engine.engine import Engine
from patchclamp_server.engine.request import Capture
from patchclamp_server.text.prompt import PromptEncoder

Comparing: TypeAlias = AveragePrecision | WelchT | ContrastSet | SparseProbes
Found: TypeAlias = tuple[list[Scored], dict[str, Any]]
# activations [texts, units], is_target [texts] -> scores [units]
Scorer: TypeAlias = Callable[[Tensor, Tensor], Tensor]
AVERAGE_PRECISION_NEURONS = 3000


async def by_texts(
    engine: Engine, prompts: PromptEncoder, method: Comparing, job: Localization
) -> AsyncGenerator[Progress | Found, None]:
    """Yields progress, then scores for the target label and the fields of Localized beside the sets."""
    capture = Capture(job.site, job.layers, method.pooling)
    texts = pooled_texts(
        engine,
        prompts,
        method.texts,
        capture,
        holdout_fraction=job.holdout_fraction,
        seed=job.seed,
        field=f"{job.name}.texts",
    )
    async with aclosing(texts) as events:
        async for event in events:
            if isinstance(event, Progress):
                yield event
                continue
            if isinstance(method, SparseProbes):
                async with aclosing(probes(event, method, job)) as found:
                    async for each in found:
                        yield each
                return
            measure, scorer, judge = _scorers(method, job)
            scores, heldout, values = list[Tensor](), list[Tensor](), list[Tensor]()
            for row in range(len(job.layers)):
                own = await asyncio.to_thread(_layer, event, row, method, scorer, judge)
                for column, part in zip((scores, heldout, values), own, strict=True):
                    column.append(part)
                yield Progress("scores", row + 1, len(job.layers))
            size = job.size or _default_size(method, torch.stack(scores))
            name = method.texts.corpus.labels[method.target]
            scored = Scored(name, torch.stack(scores), measure, torch.stack(heldout), size, torch.stack(values))
            yield [scored], {"texts": len(event.labels), "tokens": event.tokens}


def _scorers(method: AveragePrecision | WelchT | ContrastSet, job: Localization) -> tuple[str, Scorer, Scorer]:
    match method:
        case AveragePrecision():
            return "average precision", average_precision.scores, average_precision.scores
        case WelchT():
            return "Welch's t", welch_t.scores, welch_t.scores
        case ContrastSet():
            scorer = partial(
                contrast_set.scores,
                z=method.z,
                subsets=method.subsets,
                agreement=method.agreement,
                seed=job.seed,
                field="contrast_set.subsets",
            )
            return "Welch's t", scorer, welch_t.scores


def _layer(
    texts: PooledTexts, row: int, method: AveragePrecision | WelchT | ContrastSet, scorer: Scorer, judge: Scorer
) -> tuple[Tensor, Tensor, Tensor]:
    """Returns the scores [d_ff] by what was not held out, those by what was, and the mean activation on the target."""
    x, is_target = compared(texts, row, method, heldout=False)
    return scorer(x, is_target), judge(*compared(texts, row, method, heldout=True)), x[is_target].mean(0)


def compared(texts: PooledTexts, row: int, method: Comparing, *, heldout: bool) -> tuple[Tensor, Tensor]:
    """Returns activations [texts, d_ff] of the target and of what it is compared with, and which are the target's."""
    x, labels = texts.part(row, heldout=heldout)
    contrast = getattr(method, "contrast", None)
    if contrast is not None:
        own = (labels == method.target) | (labels == contrast)
        x, labels = x[own], labels[own]
    return x, labels == method.target


def _default_size(method: Comparing, scores: Tensor) -> int:
    if isinstance(method, ContrastSet):
        return scores.numel()
    share = max(1, scores.numel() // 100)
    return min(share, AVERAGE_PRECISION_NEURONS) if isinstance(method, AveragePrecision) else share
