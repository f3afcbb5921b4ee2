"""How much likelier what has the concept becomes than what has its opposite, by prompt, and what is told of it.

    preference   mean over texts with the concept of log p a token, less that over texts without, as continuations
    effect       preference under an edit or after an instruction, less that of the unsteered model at the same prompt

Both are in nats. An interval has the middle 95 % of draws of prompts with replacement. Differences are taken prompt by
prompt before they are drawn: what prompts have in common does not widen them.
"""

import random
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from statistics import fmean
from typing import Any

import torch

from patchclamp import Client
from patchclamp.programs import add
from patchclamp_server.analysis.neurons.intervals import Items, interval_of
from patchclamp_server.analysis.steering.detection.ranking import ranking
from vectors.concepts import Concept, Prompts

# Between an instruction and a prompt, as CalibrateVector puts it.
AFTER_INSTRUCTION = "\n\n"
# Requests in flight: as many as an analysis job of the server has.
IN_FLIGHT = 16
Row = dict[str, Any]


def preferences(client: Client, prompts: Prompts, program: Any = None, before: str = "") -> list[float]:
    """Of each prompt, under a program, or after a text."""
    texts = [*prompts.positive, *prompts.negative]

    def of(prompt: str) -> float:
        scores = [client.score(before + prompt, text, program=program) for text in texts]
        by_text = [score.total_logprob / len(score.tokens) for score in scores]
        n = len(prompts.positive)
        return fmean(by_text[:n]) - fmean(by_text[n:])

    with ThreadPoolExecutor(IN_FLIGHT) as pool:
        return list(pool.map(of, prompts.prompts))


def random_edits(n: int, width: int, length: float, layer: int) -> list[Any]:
    """Normally distributed vectors of this length, added at a layer."""
    edits = []
    for seed in range(n):
        draw = random.Random(f"{seed} {layer}")
        drawn = [draw.gauss(0, 1) for _ in range(width)]
        norm = sum(x * x for x in drawn) ** 0.5
        edits.append(add([x * length / norm for x in drawn], layers=layer))
    return edits


def less(values: Sequence[float], others: Sequence[float]) -> list[float]:
    return [own - other for own, other in zip(values, others, strict=True)]


def interval(values: Sequence[float]) -> Row:
    """The mean over prompts."""
    x = torch.tensor(values, dtype=torch.float64)
    return rounded(interval_of(Items(x, torch.ones_like(x)), lambda mean: mean, seed=0))


def rounded(found: Any) -> Row:
    """Of an interval of the server, or of a client's result."""
    return {name: round(getattr(found, name), 4) for name in ("mean", "low", "high")}


def asked(client: Client, concept: Concept) -> Row:
    """AUROC of log p(yes) - log p(no) after a text and the question whether it has the concept."""
    labelled = [(text, label == concept.label) for label, own in concept.detected.items() for text in own]

    def odds(text: str) -> float:
        prompt = f"Text: {text}\nQuestion: {concept.question} Answer yes or no.\nAnswer:"
        yes, no = (client.score(prompt, answer).total_logprob for answer in (" yes", " no"))
        return yes - no

    with ThreadPoolExecutor(IN_FLIGHT) as pool:
        scores = list(pool.map(lambda each: odds(each[0]), labelled))
    is_target = torch.tensor([target for _, target in labelled]).numpy()
    return rounded(ranking(torch.tensor(scores, dtype=torch.float64).numpy(), is_target, seed=0).auroc)
