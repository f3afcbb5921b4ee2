"""Definition vector: the state of the last token after demonstrations "definition => word" and one more definition.

    a large grey animal with a trunk => elephant
    what one reads => book
    a vehicle with two wheels =>         h of this last token, layer by layer

No pairs are needed. All prompts have the same demonstrations, at most SHOTS of them. Measured at each layer, on the N
demonstrations that are held out: states after their definitions and after their words ("bicycle =>"), each set without
its mean; the share of definitions whose most similar state (cosine) of the N words is that of their own. Beside it
chance, 1 / N, and as a baseline the same without demonstrations, at the best layer. Source: Xu et al. 2024, On the
Tip of the Tongue: Analyzing Conceptual Representation in Large Language Models with Reverse-Dictionary Probe, §3.
"""

import random
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from dataclasses import dataclass
from typing import TypeAlias

import torch
from torch import Tensor

from patchclamp_server.analysis.digests import json_digest
from patchclamp_server.analysis.progress import Progress, Steps
from patchclamp_server.analysis.steering.demonstrations import Demonstration, Encode, last_states, norms, prompt
from patchclamp_server.analysis.steering.evidence import LayerEvidence, training_pairs
from patchclamp_server.analysis.steering.result import Card, Result, best_by_accuracy, stored
from patchclamp_server.artifacts.store import ArtifactStore
from patchclamp_server.artifacts.types import NO_TAGS, Tags
from patchclamp_server.engine.engine import Engine
from patchclamp_server.errors import InvalidArgument
from patchclamp_server.model.info import ModelInfo
from patchclamp_server.model.sites import Site

SHOTS = 24
MIN_CONCEPTS = 2
MEASURE = "held-out definitions whose state is nearest to that of their word, of all held-out words; beside it chance"
Prompts: TypeAlias = tuple[tuple[int, ...], ...]


@dataclass(frozen=True)
class DefinitionPrompts:
    """Token ids: of the definition itself, and of what the held-out demonstrations ask, with and without the shots."""

    defined: tuple[int, ...]
    definitions: Prompts
    words: Prompts
    bare_definitions: Prompts
    bare_words: Prompts
    shots: int

    @classmethod
    def of(
        cls, demonstrations: Sequence[Demonstration], definition: str, fraction: float, seed: int, encode: Encode
    ) -> "DefinitionPrompts":
        """Raises InvalidArgument on "demonstrations" where there are too few."""
        n = min(SHOTS, training_pairs(len(demonstrations), fraction, "demonstrations"))
        order = list(range(len(demonstrations)))
        random.Random(seed).shuffle(order)
        shown, heldout = [demonstrations[i] for i in order[:n]], sorted(order[n:])
        if len(heldout) < MIN_CONCEPTS:
            message = f"{len(heldout)} of {len(demonstrations)} are held out; expected at least {MIN_CONCEPTS} concepts"
            raise InvalidArgument("demonstrations", message)
        held = [(demonstrations[i], f"demonstrations[{i}]") for i in heldout]
        sets = [
            tuple(encode(prompt(before, text), f"{field}.{name}") for text, field, name in asked)
            for before in (shown, ())
            for asked in (
                [(each.input, field, "input") for each, field in held],
                [(each.output, field, "output") for each, field in held],
            )
        ]
        return cls(encode(prompt(shown, definition), "definition"), sets[0], sets[1], sets[2], sets[3], n)


@dataclass(frozen=True, eq=False)
class DefinitionVector:
    prompts: DefinitionPrompts
    demonstrations: tuple[Demonstration, ...]
    definition: str
    site: Site
    layers: tuple[int, ...]
    holdout_fraction: float = 0.25
    seed: int = 0
    description: str = ""
    tags: Tags = NO_TAGS


async def definition_vector(
    engine: Engine, store: ArtifactStore, info: ModelInfo, job: DefinitionVector
) -> AsyncGenerator[Progress | Result, None]:
    """Yields progress, then the result. Stages are "activations", counted in prompts, and "evidence", in layers."""
    prompts = job.prompts
    n = len(prompts.definitions)
    texts = (
        prompts.defined,
        *prompts.definitions,
        *prompts.words,
        *prompts.bare_definitions,
        *prompts.bare_words,
    )
    steps, states = Steps("activations", len(texts)), list[Tensor]()
    async with aclosing(last_states(engine, texts, job.site, job.layers)) as found:
        async for state in found:
            states.append(state)
            yield steps.advance()
    vectors, *held = states
    sets = [torch.stack(held[start : start + n]) for start in range(0, 4 * n, n)]
    activation_norms = norms(held[:n])

    evidence = []
    for row, layer in enumerate(job.layers):
        evidence.append(
            LayerEvidence(
                layer,
                heldout_accuracy=nearest_accuracy(sets[0][:, row], sets[1][:, row]),
                random_accuracy=1 / n,
                norm=float(vectors[row].norm()),
                activation_norm=float(activation_norms[row]),
                explained_variance=0.0,
                margin=0.0,
                midpoint=None,
                pooled_tokens=1,
            )
        )
        yield Progress("evidence", row + 1, len(job.layers))
    best = best_by_accuracy(evidence)
    row = job.layers.index(best.layer)
    baselines = {"without_demonstrations": nearest_accuracy(sets[2][:, row], sets[3][:, row])}
    yield await stored(
        store,
        info,
        job,
        dict(zip(job.layers, vectors, strict=True)),
        Card(tuple(evidence), best.layer, MEASURE, _warnings(best), baselines),
        method="definition",
        parameters={"shots": prompts.shots},
        source={
            "definition": job.definition,
            "demonstrations": len(job.demonstrations),
            "demonstrations_digest": json_digest([[each.input, each.output] for each in job.demonstrations]),
        },
        evidence={"training_demonstrations": prompts.shots, "heldout_demonstrations": n},
    )


def nearest_accuracy(definitions: Tensor, words: Tensor) -> float:
    """Returns the share of definitions [n, d] that are nearest to their own of the words [n, d], by the cosine of both
    without the means of their sets."""
    own, other = (
        torch.nn.functional.normalize((each - each.mean(dim=0)).double(), dim=1) for each in (definitions, words)
    )
    nearest = (own @ other.T).argmax(dim=1)
    return float((nearest == torch.arange(len(own))).double().mean())


def _warnings(best: LayerEvidence) -> tuple[str, ...]:
    if best.heldout_accuracy > best.random_accuracy:
        return ()
    return (
        f"at no layer are held-out definitions nearer to their own word ({best.heldout_accuracy:.2f}) than by chance "
        f"({best.random_accuracy:.2f})",
    )
