"""Runs one extraction: contrast pairs → activations → directions → evidence → stored artifact."""

import asyncio
from collections import defaultdict
from collections.abc import AsyncGenerator
from contextlib import aclosing
from dataclasses import asdict, dataclass, replace
from typing import TypeAlias

import torch

from patchclamp_server.analysis.activations import collect
from patchclamp_server.analysis.digests import json_digest
from patchclamp_server.analysis.progress import Progress
from patchclamp_server.analysis.steering.evidence import (
    RANDOM_DIRECTIONS,
    LayerEvidence,
    Sides,
    best_layer,
    layer_evidence,
    shuffled,
    training_pairs,
    warnings,
)
from patchclamp_server.analysis.steering.registry import METHODS
from patchclamp_server.analysis.steering.token_projections import MAX_EXAMPLES, TokenProjections, project
from patchclamp_server.artifacts.store import ArtifactStore
from patchclamp_server.artifacts.types import NO_TAGS, ArtifactInfo, ArtifactKind, Tags
from patchclamp_server.engine.engine import Engine
from patchclamp_server.engine.request import Capture
from patchclamp_server.errors import InvalidArgument
from patchclamp_server.interventions.pooling import Pooling
from patchclamp_server.model.info import ModelInfo
from patchclamp_server.model.sites import Site

# These are the projections of tokens, by layer.
Tokens: TypeAlias = defaultdict[int, list[float]]
MAX_ACTIVATION_BYTES = 4 << 30
PROGRESS_EVENTS = 100
# It is relative to the norm of activations, in float32.
ROUNDING = 1e-5


@dataclass(frozen=True)
class TokenPair:
    positive: tuple[int, ...]
    negative: tuple[int, ...]


@dataclass(frozen=True)
class Extraction:
    """What to extract. `method` is a name of METHODS; `layers` are 0-based, ascending, and at least one."""

    method: str
    pairs: tuple[TokenPair, ...]
    site: Site
    layers: tuple[int, ...]
    pooling: Pooling = Pooling.LAST_TOKEN
    holdout_fraction: float = 0.25
    seed: int = 0
    description: str = ""
    tags: Tags = NO_TAGS


@dataclass(frozen=True)
class Result:
    artifact: ArtifactInfo
    layers: tuple[LayerEvidence, ...]
    best_layer: int
    warnings: tuple[str, ...]


async def extract(
    engine: Engine, store: ArtifactStore, info: ModelInfo, job: Extraction
) -> AsyncGenerator[Progress | Result, None]:
    """Yields progress, then the result. Ending the iteration early cancels what the engine still computes.

    Stages are "activations" and "tokens", counted in prompts, and "directions" and "evidence", counted in layers.

    Raises InvalidArgument on too few or too many pairs and where both sides have the same activations.
    """
    n_pairs, n_layers = len(job.pairs), len(job.layers)
    n_training = training_pairs(n_pairs, job.holdout_fraction)
    shape = (n_pairs, n_layers, info.sites[job.site])
    _check_size(shape)
    # Rows are in shuffled order, so that the training and the held-out pairs are two slices and need no copy.
    order = shuffled(n_pairs, job.seed)
    positive, negative = torch.empty(shape), torch.empty(shape)
    prompts = [tokens for i in order for tokens in (job.pairs[i].positive, job.pairs[i].negative)]
    capture = Capture(job.site, job.layers, job.pooling)
    done = 0
    pooled_tokens, left_out = torch.zeros(2, n_layers, dtype=torch.int64)
    async with aclosing(collect(engine, prompts, capture)) as collected:
        async for index, pooled in collected:
            (negative if index % 2 else positive)[index // 2] = pooled.values
            pooled_tokens += pooled.tokens
            left_out += pooled.left_out
            done += 1
            if done * PROGRESS_EVENTS // len(prompts) > (done - 1) * PROGRESS_EVENTS // len(prompts):
                yield Progress("activations", done, len(prompts))

    method = METHODS[job.method]
    directions: dict[int, torch.Tensor] = {}
    for row, layer in enumerate(job.layers):
        training = positive[:n_training, row : row + 1], negative[:n_training, row : row + 1]
        found = await asyncio.to_thread(method, *training, job.seed)
        directions[layer] = _checked(found[0], training[0][:, 0], layer)
        yield Progress("directions", row + 1, n_layers)

    # The held-out pairs are positive, negative, positive, ... in order.
    examples = prompts[2 * n_training :][: 2 * MAX_EXAMPLES]
    sides: tuple[Tokens, Tokens] = (defaultdict(list), defaultdict(list))
    done = 0
    async with aclosing(project(engine, info, examples, job.site, directions)) as projected:
        async for projections in projected:
            for layer, tokens in projections.items():
                sides[done % 2][layer] += tokens
            done += 1
            yield Progress("tokens", done, len(examples))

    evidence: list[LayerEvidence] = []
    for row, layer in enumerate(job.layers):
        training_sides = Sides(positive[:n_training, row], negative[:n_training, row])
        heldout_sides = Sides(positive[n_training:, row], negative[n_training:, row])
        measured = await asyncio.to_thread(
            layer_evidence, layer, directions[layer], training_sides, heldout_sides, job.seed
        )
        positive_tokens, negative_tokens = (TokenProjections.of(side[layer]) for side in sides)
        evidence.append(
            replace(
                measured,
                positive_tokens=positive_tokens,
                negative_tokens=negative_tokens,
                pooled_tokens=int(pooled_tokens[row]),
                tokens_left_out=int(left_out[row]),
            )
        )
        yield Progress("evidence", row + 1, n_layers)

    best, warned = best_layer(evidence), warnings(evidence)
    artifact = await asyncio.to_thread(
        store.put,
        ArtifactKind.VECTOR,
        {f"layer.{layer}": direction for layer, direction in directions.items()},
        model_fingerprint=info.fingerprint,
        site=job.site,
        description=job.description,
        provenance=_provenance(info, job),
        evidence={
            "best_layer": best,
            "training_pairs": n_training,
            "heldout_pairs": n_pairs - n_training,
            "random_directions": RANDOM_DIRECTIONS,
            "layers": [asdict(e) for e in evidence],
            "warnings": list(warned),
        },
        tags=job.tags,
    )
    yield Result(artifact, tuple(evidence), best, warned)


def _provenance(info: ModelInfo, job: Extraction) -> dict[str, object]:
    return {
        "method": job.method,
        "parameters": {
            "site": job.site.value,
            "layers": list(job.layers),
            "pooling": job.pooling.value,
            "holdout_fraction": job.holdout_fraction,
            # The seed is text: JSON and google.protobuf.Struct keep numbers as doubles, and a seed has 64 bits.
            "seed": str(job.seed),
        },
        "pairs": len(job.pairs),
        # The digest is over the token ids of all pairs in order: [[positive, negative], ...].
        "pairs_digest": json_digest([[pair.positive, pair.negative] for pair in job.pairs]),
        "model": info.name,
    }


def _check_size(shape: tuple[int, int, int]) -> None:
    pairs, layers, width = shape
    size = 2 * pairs * layers * width * 4
    if size > MAX_ACTIVATION_BYTES:
        raise InvalidArgument(
            "pairs",
            f"{pairs} pairs at {layers} layers of width {width} take {size} bytes of activations; "
            f"the limit is {MAX_ACTIVATION_BYTES}: send fewer pairs or name fewer layers",
        )


def _checked(direction: torch.Tensor, activations: torch.Tensor, layer: int) -> torch.Tensor:
    """Returns direction [d], unless rounding left it of equal sides: the batch a prompt runs in moves last bits."""
    rounding = ROUNDING * activations.norm(dim=1).mean()
    if not direction.isfinite().all() or direction.norm() <= rounding:
        raise InvalidArgument(
            "pairs",
            f"layer {layer} has no direction: both sides have the same mean activation there (the same last "
            "token before the first attention, for example); leave the layer out or pool differently",
        )
    return direction
