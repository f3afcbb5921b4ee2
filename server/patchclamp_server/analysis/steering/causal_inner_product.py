"""Causal inner product: v = C⁻¹ · mean(u⁺ - u⁻), from the weights of the unembedding alone.

    u⁺, u⁻   rows of the unembedding of counterfactual words, such as "king" and "queen", as a state of the residual
             stream meets them: with the scale of the final norm
    C        covariance of the rows of all tokens (its pseudo-inverse where it has none)

A difference of rows itself also moves logits of words that merely correlate with these; C⁻¹ takes that away, in that
concepts which vary independently over the vocabulary do not move each other. No text is run. Added to a state before
the final norm, v moves the logit of a token by v · u / (divisor of the norm). Its length is that of the formula.

Measured on held-out pairs of words, by their rows: the share on the right side of the midpoint of the training pairs,
beside random directions. Source: Park et al. 2023, The Linear Representation Hypothesis and the Geometry of Large
Language Models, §3 and theorem 3.4.
"""

import asyncio
from collections.abc import AsyncGenerator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from patchclamp_server.analysis.digests import json_digest
from patchclamp_server.analysis.neurons.weights import Vocabulary
from patchclamp_server.analysis.progress import Progress
from patchclamp_server.analysis.requests import result_of
from patchclamp_server.analysis.steering.evidence import (
    RANDOM_DIRECTIONS,
    LayerEvidence,
    Sides,
    layer_evidence,
    shuffled,
    training_pairs,
)
from patchclamp_server.analysis.steering.result import Card, Result, stored
from patchclamp_server.artifacts.store import ArtifactStore
from patchclamp_server.artifacts.types import NO_TAGS, Tags
from patchclamp_server.engine.engine import Engine
from patchclamp_server.engine.exclusive import Slice, Sliced
from patchclamp_server.errors import InvalidArgument
from patchclamp_server.model.decoder import Decoder
from patchclamp_server.model.info import ModelInfo
from patchclamp_server.model.sites import Site

MEASURE = "held-out words on the right side of the midpoint, by their unembedding rows; beside it random directions"


@dataclass(frozen=True, eq=False)
class CausalInnerProduct:
    """`tokens`: (positive, negative) of each pair of words. All layers get the same vector."""

    tokens: tuple[tuple[int, int], ...]
    words: tuple[tuple[str, str], ...]
    site: Site
    layers: tuple[int, ...]
    holdout_fraction: float = 0.25
    seed: int = 0
    description: str = ""
    tags: Tags = NO_TAGS


@dataclass(frozen=True, eq=False)
class Rows:
    """Rows of the positive and negative words [n, d], and the covariance [d, d] of the rows of all tokens."""

    positive: Tensor
    negative: Tensor
    covariance: Tensor


async def causal_inner_product(
    engine: Engine, store: ArtifactStore, info: ModelInfo, job: CausalInnerProduct
) -> AsyncGenerator[Progress | Result, None]:
    """Yields progress, then the result, of a job at the engine's exclusive door. Stages are "directions" and
    "evidence", of one step each."""
    n = training_pairs(len(job.tokens), job.holdout_fraction, "word_pairs")
    order = shuffled(len(job.tokens), job.seed)
    rows = await result_of(engine, _rows(engine.model.decoder, [job.tokens[i] for i in order]))
    training, heldout = (Sides(rows.positive[own], rows.negative[own]) for own in (slice(n), slice(n, None)))
    direction = await asyncio.to_thread(direction_of, training.apart(), rows.covariance)
    if not direction.any() or not direction.isfinite().all():
        raise InvalidArgument("word_pairs", "both sides have the same mean row: there is no direction between them")
    yield Progress("directions", 1, 1)
    found = await asyncio.to_thread(layer_evidence, job.layers[0], direction, training, heldout, job.seed)
    # The midpoint is one of rows, which no gate sees; norms of states are not known.
    own = replace(found, midpoint=None, activation_norm=0.0)
    evidence: list[LayerEvidence] = [replace(own, layer=layer) for layer in job.layers]
    yield Progress("evidence", 1, 1)
    yield await stored(
        store,
        info,
        job,
        dict.fromkeys(job.layers, direction),
        Card(tuple(evidence), job.layers[-1], MEASURE),
        method="causal_inner_product",
        parameters={},
        source={"word_pairs": len(job.words), "word_pairs_digest": json_digest([list(pair) for pair in job.words])},
        evidence={
            "training_pairs": n,
            "heldout_pairs": len(job.words) - n,
            "random_directions": RANDOM_DIRECTIONS,
        },
    )


def direction_of(difference: Tensor, covariance: Tensor) -> Tensor:
    """Returns C⁻¹ · difference [d], in float64 and then float32."""
    inverse = torch.linalg.pinv(covariance.double(), hermitian=True)
    found: Tensor = (inverse @ difference.double()).float()
    return found


def _rows(decoder: Decoder, tokens: Sequence[tuple[int, int]]) -> Sliced[Rows]:
    # What the vocabulary takes says nothing of rows of text.
    yield Slice(1)
    vocabulary = Vocabulary.of(decoder)
    ids = torch.tensor(tokens, device=vocabulary.rows.device)
    positive, negative = (vocabulary.read_rows(side).cpu() for side in ids.T)
    return Rows(positive, negative, vocabulary.read_covariance().cpu())
