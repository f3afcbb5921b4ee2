"""Temporal heads: what facts that name a time lose without the head, beyond what other facts lose.

    effect_h(fact) = log p(answer | prompt) - log p(answer | prompt; z_h = 0)                                 nats
    score_h = mean of effect_h over time-conditioned facts - mean of effect_h over time-invariant ones

z_h is the head's output before the output projection, at every token. Every head and fact is a sequence of its own that
the engine scores, with a program of one edit, beside whatever else it serves; nothing is generated. The interval is a
bootstrap over the facts of both kinds. The control is the score with the kinds dealt out among the facts at random:
what a head reaches that harms some facts more than others, time or not. The built-in facts name their time by a year,
and the others have no figures: heads that put the digits of a year together score too.

Source: Park et al. 2025, Does Time Have Its Place? Temporal Heads: Where Language Models Recall Time-specific
Information, which finds candidates by circuits of single facts (EAP-IG) and confirms them by this ablation. Here all
heads are ablated, so no threshold on the edges of a circuit chooses what is tested.
"""

import json
from collections.abc import AsyncGenerator, Callable
from contextlib import aclosing
from dataclasses import asdict, replace
from functools import cache, partial
from pathlib import Path
from typing import TypeAlias

import torch
from torch import Tensor

from patchclamp_server.analysis.heads.scores.scoring import Fact, HeadScores, Scoring, ends, resampled_means
from patchclamp_server.analysis.progress import Progress
from patchclamp_server.analysis.requests import OnEvent, completed, score_request
from patchclamp_server.engine.engine import Engine
from patchclamp_server.engine.request import Request, Token
from patchclamp_server.errors import InvalidArgument, about
from patchclamp_server.interventions.bind import bind
from patchclamp_server.interventions.program import Edit, HeadEdit, Program
from patchclamp_server.model.info import ModelInfo
from patchclamp_server.model.sites import Site
from patchclamp_server.text.prompt import PromptEncoder

DATA = Path(__file__).parents[1] / "data" / "temporal_facts.json"
PROGRESS_EVENTS = 100
MAX_IN_FLIGHT = 64
Ids: TypeAlias = tuple[int, ...]


async def scores(engine: Engine, prompts: PromptEncoder, job: Scoring) -> AsyncGenerator[Progress | HeadScores, None]:
    facts = job.facts or built_in_facts()
    timed = torch.tensor([fact.time_conditioned for fact in facts])
    if not 2 <= int(timed.sum()) <= len(facts) - 2:
        raise InvalidArgument("facts", "need at least two time-conditioned facts and two others")
    info = engine.model.info
    requests = await prompts.analysis.run(_requests, facts, prompts, info)
    found = torch.empty(len(requests))
    async with aclosing(completed(engine, requests, max_in_flight=MAX_IN_FLIGHT)) as finished:
        done = 0
        async for events in finished:
            found[done] = sum(event.logprob or 0.0 for event in events if isinstance(event, Token))
            done += 1
            if done * PROGRESS_EVENTS // len(found) > (done - 1) * PROGRESS_EVENTS // len(found):
                yield Progress("effects", done, len(found))
    known = found[: len(facts)]
    ablated = found[len(facts) :].view(info.n_layers, info.n_heads, len(facts))
    yield _compared((known - ablated).permute(2, 0, 1), timed, facts, known, job.seed)


@cache
def built_in_facts() -> tuple[Fact, ...]:
    return tuple(Fact(**entry) for entry in json.loads(DATA.read_text(encoding="utf-8")))


def _requests(facts: tuple[Fact, ...], prompts: PromptEncoder, info: ModelInfo) -> list[Callable[[OnEvent], Request]]:
    """Returns requests for all facts unedited, then for all facts without each head, by layer and head."""
    tokens = []
    for i, fact in enumerate(facts):
        with about(f"facts[{i}].prompt"):
            prompt = prompts.encode_text(fact.prompt).ids
        answer = prompts.encode_continuation(fact.answer, f"facts[{i}].answer", prompt)
        if not answer:
            raise InvalidArgument(f"facts[{i}].answer", "is empty; at least one token is scored")
        tokens.append((prompt, answer))
    without = [
        bind(Program((Edit(HeadEdit((head,), scale=0.0), Site.ATTN_Z, layers=(layer,)),)), info)
        for layer in range(info.n_layers)
        for head in range(info.n_heads)
    ]
    return [partial(score_request, *fact, program) for program in (None, *without) for fact in tokens]


def _compared(effects: Tensor, timed: Tensor, facts: tuple[Fact, ...], known: Tensor, seed: int) -> HeadScores:
    """Returns the scores of effects [facts, n_layers, n_heads], given timed and known [facts]."""
    of_time, of_others = effects[timed], effects[~timed]
    dealt = timed[torch.randperm(len(timed), generator=torch.Generator().manual_seed(seed))]
    low, high = ends(resampled_means(of_time, seed) - resampled_means(of_others, seed ^ 1))
    found = HeadScores(
        scores=of_time.mean(0) - of_others.mean(0),
        control=effects[dealt].mean(0) - effects[~dealt].mean(0),
        low=low,
        high=high,
    )
    probabilities = zip(facts, known.exp().tolist(), strict=True)
    evidence = {
        "effect_on_time_conditioned": found.by_head(of_time.mean(0)),
        "effect_on_time_invariant": found.by_head(of_others.mean(0)),
        "facts": [{**asdict(fact), "probability": probability} for fact, probability in probabilities],
    }
    return replace(found, evidence=evidence)
