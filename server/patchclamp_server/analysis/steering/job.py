"""Runs an extraction from two sides of examples: activations → directions → evidence → stored artifact."""

import asyncio
from collections import defaultdict
from collections.abc import AsyncGenerator, Mapping
from contextlib import aclosing
from dataclasses import asdict, dataclass, field, replace
from enum import Enum
from typing import Any, TypeAlias

import torch

from patchclamp_server.analysis.progress import Progress
from patchclamp_server.analysis.steering.evidence import (
    RANDOM_DIRECTIONS,
    LayerEvidence,
    best_layer,
    layer_evidence,
    warnings,
)
from patchclamp_server.analysis.steering.examples import Examples, Split, TextSides, TokenPair, of_pairs, of_texts
from patchclamp_server.analysis.steering.registry import METHODS
from patchclamp_server.analysis.steering.result import Card, Result, stored
from patchclamp_server.analysis.steering.token_projections import MAX_EXAMPLES, TokenProjections, project
from patchclamp_server.artifacts.store import ArtifactStore
from patchclamp_server.artifacts.types import NO_TAGS, Tags
from patchclamp_server.engine.engine import Engine
from patchclamp_server.engine.request import Capture
from patchclamp_server.errors import InvalidArgument
from patchclamp_server.interventions.pooling import Pooling
from patchclamp_server.interventions.program import Scope
from patchclamp_server.model.info import ModelInfo
from patchclamp_server.model.sites import Site
from patchclamp_server.text.prompt import PromptEncoder

# These are the projections of tokens, by layer.
Tokens: TypeAlias = defaultdict[int, list[float]]
# It is relative to the norm of activations, in float32.
ROUNDING = 1e-5
MEASURE = "held-out examples on the right side of the midpoint; beside it random directions"


@dataclass(frozen=True, eq=False)
class Extraction:
    """What to extract. `method` is a name of METHODS; `layers` are 0-based, ascending, and at least one. `texts` are
    given instead of pairs."""

    method: str
    pairs: tuple[TokenPair, ...]
    site: Site
    layers: tuple[int, ...]
    pooling: Pooling = Pooling.LAST_TOKEN
    holdout_fraction: float = 0.25
    seed: int = 0
    description: str = ""
    tags: Tags = NO_TAGS
    texts: TextSides | None = None
    scope: Scope = field(default_factory=Scope)


async def extract(
    engine: Engine, store: ArtifactStore, info: ModelInfo, prompts: PromptEncoder, job: Extraction
) -> AsyncGenerator[Progress | Result, None]:
    """Yields progress, then the result. Ending the iteration early cancels what the engine still computes.

    Stages are "activations" and "tokens", counted in prompts, and "directions" and "evidence", counted in layers.

    Raises InvalidArgument on too few or too many pairs or texts and where both sides have the same activations.
    """
    capture = Capture(job.site, job.layers, job.pooling, job.scope)
    split = Split(job.holdout_fraction, job.seed)
    if job.texts is None:
        found = of_pairs(engine, job.pairs, capture, split, info.sites[job.site])
    else:
        found = of_texts(engine, prompts, job.texts, capture, split)
    async with aclosing(found) as events:
        async for event in events:
            if isinstance(event, Progress):
                yield event
                continue
            async with aclosing(_measured(engine, store, info, job, event)) as told:
                async for each in told:
                    yield each


async def _measured(
    engine: Engine, store: ArtifactStore, info: ModelInfo, job: Extraction, examples: Examples
) -> AsyncGenerator[Progress | Result, None]:
    n_layers = len(job.layers)
    training = examples.training
    method = METHODS[job.method]
    directions: dict[int, torch.Tensor] = {}
    for row, layer in enumerate(job.layers):
        own = training.positive[:, row : row + 1], training.negative[:, row : row + 1]
        found = await asyncio.to_thread(method, *own, job.seed)
        directions[layer] = checked_direction(found[0], own[0][:, 0], layer, examples.field)
        yield Progress("directions", row + 1, n_layers)

    evidence: tuple[LayerEvidence, ...] = ()
    async with aclosing(evidence_of(engine, info, job.site, directions, examples, job.seed)) as measured:
        async for event in measured:
            if isinstance(event, Progress):
                yield event
            else:
                evidence = event

    yield await stored(
        store,
        info,
        job,
        directions,
        Card(evidence, best_layer(evidence), MEASURE, warnings(evidence)),
        method=job.method,
        parameters={"pooling": job.pooling.value, **_scope(job.scope)},
        source=examples.described,
        evidence={**_numbers(examples), "random_directions": RANDOM_DIRECTIONS},
    )


async def evidence_of(
    engine: Engine, info: ModelInfo, site: Site, directions: Mapping[int, torch.Tensor], examples: Examples, seed: int
) -> AsyncGenerator[Progress | tuple[LayerEvidence, ...], None]:
    """Yields progress, then the evidence of directions [d] by layer; `examples` have the same layers in their order.

    Stages are "tokens", counted in examples, and "evidence", in layers."""
    shown = [(side, text) for side in (0, 1) for text in examples.heldout_tokens[side][:MAX_EXAMPLES]]
    sides: tuple[Tokens, Tokens] = (defaultdict(list), defaultdict(list))
    done = 0
    async with aclosing(project(engine, info, [text for _, text in shown], site, directions)) as projected:
        async for projections in projected:
            for layer, tokens in projections.items():
                sides[shown[done][0]][layer] += tokens
            done += 1
            yield Progress("tokens", done, len(shown))

    evidence = []
    for row, (layer, direction) in enumerate(directions.items()):
        at = layer, direction, examples.training.at(row), examples.heldout.at(row)
        measured = await asyncio.to_thread(layer_evidence, *at, seed)
        positive_tokens, negative_tokens = (TokenProjections.of(side[layer]) for side in sides)
        evidence.append(
            replace(
                measured,
                positive_tokens=positive_tokens,
                negative_tokens=negative_tokens,
                pooled_tokens=int(examples.pooled_tokens[row]),
                tokens_left_out=int(examples.left_out[row]),
            )
        )
        yield Progress("evidence", row + 1, len(directions))
    yield tuple(evidence)


def _numbers(examples: Examples) -> dict[str, int]:
    """Returns how many examples there are: of pairs, or of either side."""
    training, heldout = examples.training, examples.heldout
    if examples.field == "pairs":
        return {"training_pairs": len(training.positive), "heldout_pairs": len(heldout.positive)}
    return {
        "training_positives": len(training.positive),
        "training_negatives": len(training.negative),
        "heldout_positives": len(heldout.positive),
        "heldout_negatives": len(heldout.negative),
    }


def _scope(scope: Scope) -> dict[str, Any]:
    """Returns what provenance says of a scope: nothing of one of every token."""

    def plain(fields: list[tuple[str, Any]]) -> dict[str, Any]:
        shown: Mapping[str, Any] = {k: v.value if isinstance(v, Enum) else v for k, v in fields}
        return {k: list(v) if isinstance(v, tuple) else v for k, v in shown.items() if v is not None and v != ()}

    return {} if scope == Scope() else {"scope": asdict(scope, dict_factory=plain)}


def checked_direction(direction: torch.Tensor, activations: torch.Tensor, layer: int, field: str) -> torch.Tensor:
    """Returns direction [d], unless rounding left it of equal sides: the batch a prompt runs in moves last bits."""
    rounding = ROUNDING * activations.norm(dim=1).mean()
    if not direction.isfinite().all() or direction.norm() <= rounding:
        raise InvalidArgument(
            field,
            f"layer {layer} has no direction: both sides have the same mean activation there (the same last "
            "token before the first attention, for example); leave the layer out or pool differently",
        )
    return direction
