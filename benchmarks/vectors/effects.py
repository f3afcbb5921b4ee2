"""How much likelier what has the concept becomes than what has its opposite, by prompt; and what prompting does.

    preference   mean over texts with the concept of log p a token, less that over texts without, as continuations
    effect       preference under an edit less that of the unsteered model at the same prompt, or with an instruction
                 less that without

Both are in nats. An interval has the middle 95 % of draws of prompts with replacement. Differences are taken prompt by
prompt before they are drawn: what prompts have in common does not widen them.

An instruction is given as one would give it to this model: a user asks in a chat for a text, with the instruction or
without, and the prompt begins the answer. (Before a plain prompt, or as a system message, it does less.)
"""

import random
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from statistics import fmean
from typing import Any, TypeVar

import torch

from patchclamp import Client
from patchclamp.programs import add
from patchclamp_server.analysis.neurons.intervals import Items, interval_of
from patchclamp_server.analysis.steering.calibration.coherence import repetition
from patchclamp_server.analysis.steering.detection.ranking import ranking
from vectors.concepts import Concept, Prompts

REQUEST = "Write a text."
# Requests in flight: as many as an analysis job of the server has.
IN_FLIGHT = 16
Row = dict[str, Any]
# What Generate and Score take as a prompt.
Form = Callable[[str], Row]
Item = TypeVar("Item")
Found = TypeVar("Found")


def plain(prompt: str) -> Row:
    return {"prompt": prompt}


def chat(instruction: str = "") -> Form:
    """The prompt begins the answer to a request for a text."""
    asks = {"role": "user", "content": f"{REQUEST} {instruction}".strip()}
    return lambda prompt: {
        "messages": [asks, {"role": "assistant", "content": prompt}],
        "continue_final_message": True,
    }


def preferences(client: Client, prompts: Prompts, form: Form = plain, program: Any = None) -> list[float]:
    """Of each prompt, under a program."""
    texts, n = [*prompts.positive, *prompts.negative], len(prompts.positive)

    def of(prompt: str) -> float:
        scores = [client.score(**form(prompt), continuation=text, program=program) for text in texts]
        by_text = [score.total_logprob / len(score.tokens) for score in scores]
        return fmean(by_text[:n]) - fmean(by_text[n:])

    return together(of, prompts.prompts)


def random_edits(n: int, width: int, length: float, layer: int) -> list[Any]:
    """Normally distributed vectors of this length, added at a layer."""
    edits = []
    for seed in range(n):
        draw = random.Random(f"{seed} {layer}")
        drawn = [draw.gauss(0, 1) for _ in range(width)]
        norm = sum(x * x for x in drawn) ** 0.5
        edits.append(add([x * length / norm for x in drawn], layers=layer))
    return edits


def written(client: Client, concept: Concept, prompts: Sequence[str], tokens: int) -> Row:
    """What the instruction makes the model write, as CalibrateVector measures a text: read after the prompt alone."""
    form = chat(concept.instruction)

    def of(prompt: str) -> tuple[str, list[int], float]:
        result = client.generate(**form(prompt), max_tokens=tokens).result()
        ids = [token.id for token in result.tokens]
        return result.text, ids, -client.score(prompt, ids).total_logprob if ids else 0.0

    texts = together(of, prompts)
    surprise = torch.tensor([nll for _, _, nll in texts], dtype=torch.float64)
    lengths = torch.tensor([float(len(ids)) for _, ids, _ in texts], dtype=torch.float64)
    said = [text.casefold() for text, _, _ in texts]
    return {
        "words": interval([float(any(word.casefold() in text for word in concept.words)) for text in said]),
        "perplexity": rounded(interval_of(Items(surprise, lengths), torch.exp, seed=0)),
        "repetition": interval([repetition(tuple(ids)) for _, ids, _ in texts]),
        "example": texts[0][0],
    }


def asked(client: Client, concept: Concept) -> Row:
    """AUROC of log p(Yes) - log p(No) as the answer to a user who asks whether a text has the concept."""
    labelled = [(text, label == concept.label) for label, own in concept.detected.items() for text in own]

    def odds(text: str) -> float:
        messages = [{"role": "user", "content": f"{text}\n\n{concept.question} Answer yes or no."}]
        yes, no = (client.score(messages=messages, continuation=each).total_logprob for each in ("Yes", "No"))
        return yes - no

    scores = torch.tensor(together(odds, [text for text, _ in labelled]), dtype=torch.float64)
    is_target = torch.tensor([target for _, target in labelled])
    return rounded(ranking(scores.numpy(), is_target.numpy(), seed=0).auroc)


def together(of: Callable[[Item], Found], items: Iterable[Item]) -> list[Found]:
    with ThreadPoolExecutor(IN_FLIGHT) as pool:
        return list(pool.map(of, items))


def less(values: Sequence[float], others: Sequence[float]) -> list[float]:
    return [own - other for own, other in zip(values, others, strict=True)]


def interval(values: Sequence[float]) -> Row:
    """The mean over prompts."""
    x = torch.tensor(values, dtype=torch.float64)
    return rounded(interval_of(Items(x, torch.ones_like(x)), lambda mean: mean, seed=0))


def rounded(found: Any, over: float = 1.0) -> Row:
    """Of an interval of the server, or of a client's result, over a number."""
    return {name: round(getattr(found, name) / over, 4) for name in ("mean", "low", "high")}
