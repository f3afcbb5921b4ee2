"""The metrics of activation patching, each a sum over requests that score something after a prompt.

log_probability_difference    log p(answer) - log p(other answer)      summed over their tokens, nats
log_probability               log p(answer)
divergence                    -KL(source run ‖ this run) of the next token, nats
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch

from patchclamp_server.analysis.patching.grid import Metric, Pair
from patchclamp_server.analysis.requests import Make, OnEvent, score_request
from patchclamp_server.engine.reducers.divergence import Reference
from patchclamp_server.engine.request import Event, Priority, Reduction, Request, StopParams, Token
from patchclamp_server.interventions.bound import BoundProgram

Ids = tuple[int, ...]
# What is scored where only the prediction of it matters.
_ANY_TOKEN = 0


@dataclass(frozen=True, eq=False)
class Part:
    """One request of a metric, and what its events add to it."""

    make: Make
    read: Callable[[list[Event]], float]


def parts_of(metric: Metric, pair: Pair, prompt: Ids, program: BoundProgram | None, source: Reference) -> list[Part]:
    """Returns the requests of a metric. `source` has the prediction of the run that activations come from; only a
    divergence needs it."""
    if metric is Metric.DIVERGENCE:
        own = Reference(len(prompt))
        return [Part(partial(_predict, prompt, program, own, ()), lambda events: -divergence(source, own))]
    answers = [(pair.answer, 1.0)]
    if metric is Metric.LOG_PROBABILITY_DIFFERENCE:
        answers.append((pair.other_answer, -1.0))
    return [
        Part(partial(score_request, prompt, answer, program), partial(_log_probability, sign))
        for answer, sign in answers
    ]


def capturing(prompt: Ids, reductions: tuple[Reduction, ...], prediction: Reference) -> Make:
    """Returns a request that gives the rows of a prompt to reductions, and keeps what is predicted after it."""
    return partial(_predict, prompt, None, prediction, reductions)


def divergence(p: Reference, q: Reference) -> float:
    """Returns KL(p ‖ q) of the first prediction of each, in nats."""
    log_p, log_q = (own.logprobs[own.start].double() for own in (p, q))
    return float(torch.linalg.vecdot(log_p.exp(), log_p - log_q).clamp_min(0.0))


def _predict(
    prompt: Ids,
    program: BoundProgram | None,
    prediction: Reference,
    reductions: tuple[Reduction, ...],
    on_event: OnEvent,
) -> Request:
    return Request(
        (*prompt, _ANY_TOKEN),
        on_event,
        program,
        stop=StopParams(max_tokens=0),
        priority=Priority.ANALYSIS,
        score_from=len(prompt),
        scores=prediction,
        reductions=reductions,
    )


def _log_probability(sign: float, events: list[Event]) -> float:
    scored = [event.logprob for event in events if isinstance(event, Token) and event.logprob is not None]
    return sign * sum(scored)
