"""Pooled states of the examples of two sides, of those to learn from and of those that are held out."""

from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from patchclamp_server.analysis.activations import Roles, collect
from patchclamp_server.analysis.digests import json_digest
from patchclamp_server.analysis.neurons.localize.pooled import Comparison, Part, pooled_texts
from patchclamp_server.analysis.neurons.texts import TextSource
from patchclamp_server.analysis.progress import Progress
from patchclamp_server.analysis.steering.evidence import Sides, shuffled, training_pairs
from patchclamp_server.engine.engine import Engine
from patchclamp_server.engine.request import Capture
from patchclamp_server.errors import InvalidArgument
from patchclamp_server.text.prompt import PromptEncoder

MAX_ACTIVATION_BYTES = 4 << 30
PROGRESS_EVENTS = 100


@dataclass(frozen=True)
class TokenPair:
    positive: tuple[int, ...]
    negative: tuple[int, ...]
    positive_roles: Roles = None
    negative_roles: Roles = None


@dataclass(frozen=True, eq=False)
class TextSides:
    """Texts of the label `target` are positive, those of `contrast` negative; None: those of all other labels."""

    source: TextSource
    target: int
    contrast: int | None = None


@dataclass(frozen=True)
class Split:
    """`fraction` of the examples is held out, drawn by `seed`."""

    fraction: float
    seed: int


@dataclass(frozen=True, eq=False)
class Examples:
    """States of both sides [n, layers, d].

    `heldout_tokens`: of the held-out examples of either side. pooled_tokens and left_out [layers] are counts of all
    examples. `field` of the request has them, and `described` is what provenance says of them.
    """

    training: Sides
    heldout: Sides
    heldout_tokens: tuple[Sequence[tuple[int, ...]], Sequence[tuple[int, ...]]]
    pooled_tokens: Tensor
    left_out: Tensor
    field: str
    described: dict[str, Any]


async def of_pairs(
    engine: Engine, pairs: Sequence[TokenPair], capture: Capture, split: Split, width: int
) -> AsyncGenerator[Progress | Examples, None]:
    """Yields progress in prompts, then the examples. Raises InvalidArgument on too few or too many pairs."""
    n_pairs, n_layers = len(pairs), len(capture.layers)
    n_training = training_pairs(n_pairs, split.fraction)
    _check_size(n_pairs, n_layers, width)
    # Rows are in shuffled order, so that the training and the held-out pairs are two slices and need no copy.
    order = [pairs[i] for i in shuffled(n_pairs, split.seed)]
    positive, negative = torch.empty(2, n_pairs, n_layers, width)
    prompts = [tokens for pair in order for tokens in (pair.positive, pair.negative)]
    roles = [own for pair in order for own in (pair.positive_roles, pair.negative_roles)]
    pooled_tokens, left_out = torch.zeros(2, n_layers, dtype=torch.int64)
    async with aclosing(collect(engine, prompts, capture, roles=roles)) as collected:
        async for index, pooled in collected:
            (negative if index % 2 else positive)[index // 2] = pooled.values
            pooled_tokens += pooled.tokens
            left_out += pooled.left_out
            done = index + 1
            if done * PROGRESS_EVENTS // len(prompts) > index * PROGRESS_EVENTS // len(prompts):
                yield Progress("activations", done, len(prompts))
    heldout = prompts[2 * n_training :]
    yield Examples(
        Sides(positive[:n_training], negative[:n_training]),
        Sides(positive[n_training:], negative[n_training:]),
        (heldout[::2], heldout[1::2]),
        pooled_tokens,
        left_out,
        "pairs",
        {
            "pairs": n_pairs,
            # The digest is over the token ids of all pairs in order: [[positive, negative], ...].
            "pairs_digest": json_digest([[pair.positive, pair.negative] for pair in pairs]),
        },
    )


async def of_texts(
    engine: Engine, prompts: PromptEncoder, texts: TextSides, capture: Capture, split: Split
) -> AsyncGenerator[Progress | Examples, None]:
    """Yields progress in texts, then the examples, either side in an order of its own. Raises as pooled_texts does."""
    compared = Comparison(texts.target, texts.contrast, split.fraction, split.seed)
    found = pooled_texts(engine, prompts, texts.source, capture, compared, "texts")
    corpus = texts.source.corpus
    async with aclosing(found) as events:
        async for event in events:
            if isinstance(event, Progress):
                yield event
                continue
            training, _ = _sides(event.search, split.seed)
            heldout, tokens = _sides(event.heldout, split.seed)
            described = {
                "corpus": corpus.digest,
                "target": corpus.labels[texts.target],
                "contrast": "" if texts.contrast is None else corpus.labels[texts.contrast],
                "positives": len(training.positive) + len(heldout.positive),
                "negatives": len(training.negative) + len(heldout.negative),
            }
            yield Examples(
                training, heldout, tokens, event.pooled_tokens, event.left_out, "texts", {"texts": described}
            )


def _sides(part: Part, seed: int) -> tuple[Sides, tuple[list[tuple[int, ...]], list[tuple[int, ...]]]]:
    """Returns both sides, each in an order drawn by the seed: rows of equal number have nothing in common."""
    places = []
    for number, own in enumerate((part.is_target, ~part.is_target)):
        rows = own.nonzero()[:, 0]
        order = torch.randperm(len(rows), generator=torch.Generator().manual_seed((seed + number) % 2**63))
        places.append(rows[order])
    tokens = tuple([part.tokens[i] for i in rows.tolist()] for rows in places)
    return Sides(part.activations[places[0]], part.activations[places[1]]), (tokens[0], tokens[1])


def _check_size(pairs: int, layers: int, width: int) -> None:
    size = 2 * pairs * layers * width * 4
    if size > MAX_ACTIVATION_BYTES:
        raise InvalidArgument(
            "pairs",
            f"{pairs} pairs at {layers} layers of width {width} take {size} bytes of activations; "
            f"the limit is {MAX_ACTIVATION_BYTES}: send fewer pairs or name fewer layers",
        )
