"""What an edit of a head set changes, beside the same edit of random sets of equal size.

    metrics of a set: needle runs that succeed, mean recall, perplexity = exp(-mean log p) on ordinary text

The random heads are none of the set. Every set is a group of ordinary low-priority requests of one batch.
"""

import asyncio
import math
import random
from collections.abc import AsyncGenerator, Callable, Sequence
from contextlib import aclosing
from dataclasses import dataclass, field
from functools import partial
from statistics import fmean, pstdev

from patchclamp_server.analysis.activations import mean_activations
from patchclamp_server.analysis.heads.retrieval.needle_prompt import PromptWriter
from patchclamp_server.analysis.heads.retrieval.needle_run import NeedleRun, needle_request, needle_run
from patchclamp_server.analysis.heads.retrieval.needles import NeedleTest, plan
from patchclamp_server.analysis.heads.sets.edits import HeadEditMode, head_program
from patchclamp_server.analysis.ordinary_text import windows
from patchclamp_server.analysis.progress import Progress
from patchclamp_server.analysis.requests import OnEvent, completed, score_request
from patchclamp_server.artifacts.head_sets import Head, HeadSelection, select
from patchclamp_server.artifacts.store import ArtifactStore
from patchclamp_server.engine.engine import Engine
from patchclamp_server.engine.request import Event, Request, Token
from patchclamp_server.errors import InvalidArgument
from patchclamp_server.model.info import ModelInfo
from patchclamp_server.model.sites import Site
from patchclamp_server.text.detokenize import token_bytes
from patchclamp_server.text.prompt import PromptEncoder

MAX_RANDOM_SETS = 100


@dataclass(frozen=True)
class EditEvaluation:
    """What to evaluate; `scale` is for the mode SCALE. Without texts, perplexity is that of the built-in one."""

    heads: HeadSelection
    mode: HeadEditMode = HeadEditMode.ZERO
    scale: float = 0.0
    random_sets: int = 10
    seed: int = 0
    test: NeedleTest = field(default_factory=NeedleTest)
    texts: tuple[str, ...] = ()


@dataclass(frozen=True)
class HeadMetrics:
    """The metrics with these heads edited; without heads, those of the model as it is."""

    runs: int
    successes: int
    mean_recall: float
    perplexity: float
    heads: tuple[Head, ...]


@dataclass(frozen=True)
class HeadEditEffect:
    """The metrics of each set, with means and standard deviations over the random sets of the number of successes and
    of the perplexity."""

    unedited: HeadMetrics
    edited: HeadMetrics
    random: tuple[HeadMetrics, ...]
    random_success_mean: float
    random_success_deviation: float
    random_perplexity_mean: float
    random_perplexity_deviation: float


async def evaluate_edit(
    engine: Engine, store: ArtifactStore, info: ModelInfo, prompts: PromptEncoder, job: EditEvaluation
) -> AsyncGenerator[Progress | HeadEditEffect, None]:
    """Yields progress, then the effect. Ending the iteration early cancels what the engine still computes.

    Raises InvalidArgument (field path), and NotFound or FailedPrecondition for the head set.
    """
    if not math.isfinite(job.scale):
        raise InvalidArgument("scale", f"must be finite, got {job.scale}")
    heads = await asyncio.to_thread(select, job.heads, store, info, "heads")
    sets = ((), heads, *random_sets(heads, info, job.random_sets, job.seed))
    planned = await prompts.analysis.run(plan, job.test, info)
    writer = PromptWriter(planned, info, prompts, token_bytes(engine.model.tokenizer))
    written = [await prompts.analysis.run(writer.write, placement) for placement in planned.placements]
    texts = await prompts.analysis.run(windows, job.texts, prompts, info.context_length)
    means = None
    if job.mode is HeadEditMode.MEAN:
        ordinary = await prompts.analysis.run(windows, (), prompts, info.context_length)
        means = await mean_activations(engine, Site.ATTN_Z, ordinary)
        means = means.view(info.n_layers, info.n_heads, info.head_dim)
    requests: list[Callable[[OnEvent], Request]] = []
    for edited in sets:
        program = head_program(edited, job.mode, info, scale=job.scale, means=means) if edited else None
        requests += [partial(needle_request, prompt, program) for prompt in written]
        requests += [partial(score_request, window[:1], window[1:], program) for window in texts]
    metrics: list[HeadMetrics] = []
    runs: list[NeedleRun] = []
    scored: list[Sequence[Event]] = []
    done = 0
    async with aclosing(completed(engine, requests)) as answers:
        async for events in answers:
            if len(runs) < len(written):
                runs.append(needle_run(planned, len(runs), events))
            else:
                scored.append(events)
            if len(scored) == len(texts):
                metrics.append(_metrics(runs, scored, sets[len(metrics)]))
                runs, scored = [], []
            done += 1
            yield Progress("metrics", done, len(requests))
    yield _effect(metrics)


def random_sets(heads: Sequence[Head], info: ModelInfo, n: int, seed: int) -> list[tuple[Head, ...]]:
    """Returns n sets of as many heads that are not among `heads`. Raises InvalidArgument when there are too few."""
    if not 1 <= n <= MAX_RANDOM_SETS:
        raise InvalidArgument("random_sets", f"{n} is not in 1 to {MAX_RANDOM_SETS}")
    named = set(heads)
    others = [
        Head(layer, head)
        for layer in range(info.n_layers)
        for head in range(info.n_heads)
        if Head(layer, head) not in named
    ]
    if len(others) < len(heads):
        raise InvalidArgument("heads", f"{len(heads)} heads leave {len(others)}: too few for a random set of that size")
    generator = random.Random(seed)
    return [tuple(sorted(generator.sample(others, len(heads)))) for _ in range(n)]


def _metrics(runs: Sequence[NeedleRun], scored: Sequence[Sequence[Event]], heads: tuple[Head, ...]) -> HeadMetrics:
    logprobs = [event.logprob or 0.0 for events in scored for event in events if isinstance(event, Token)]
    return HeadMetrics(
        len(runs),
        sum(run.success for run in runs),
        fmean(run.recall for run in runs),
        math.exp(-fmean(logprobs)),
        heads,
    )


def _effect(metrics: Sequence[HeadMetrics]) -> HeadEditEffect:
    unedited, edited, *drawn = metrics
    successes, perplexities = [m.successes for m in drawn], [m.perplexity for m in drawn]
    return HeadEditEffect(
        unedited, edited, tuple(drawn), fmean(successes), pstdev(successes), fmean(perplexities), pstdev(perplexities)
    )
