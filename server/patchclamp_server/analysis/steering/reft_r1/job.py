"""Trains a direction at each of some layers, one after the other, and stores the vector with its evidence.

The vector of a layer is w, as long as what training added to the positives: the mean s. The artifact is an ordinary
vector: `add` writes it, and gates, readouts and DetectConcept read h · v / ‖v‖, which is the latent before ReLU.
"""

from collections.abc import AsyncGenerator
from contextlib import aclosing
from dataclasses import asdict, dataclass, field

import torch
from torch import Tensor

from patchclamp_server.analysis.neurons.products import DifferentiableModel
from patchclamp_server.analysis.progress import Progress, Steps
from patchclamp_server.analysis.requests import exclusively
from patchclamp_server.analysis.steering.evidence import RANDOM_DIRECTIONS, LayerEvidence, best_layer
from patchclamp_server.analysis.steering.examples import Split, TextSides, TokenPair
from patchclamp_server.analysis.steering.reft_r1.direction import (
    SPARSITY,
    TOP_K,
    Place,
    Sides,
    difference_of_means,
    kept_states,
    kept_texts,
    mean_norm,
    mean_strength,
    train_direction,
)
from patchclamp_server.analysis.steering.reft_r1.evidence import measured, warnings
from patchclamp_server.analysis.steering.reft_r1.texts import DividedSides, Texts, of_pairs, of_texts
from patchclamp_server.analysis.steering.result import Card, Result, stored
from patchclamp_server.analysis.training import Training
from patchclamp_server.artifacts.store import ArtifactStore
from patchclamp_server.artifacts.types import NO_TAGS, Tags
from patchclamp_server.engine.engine import Engine
from patchclamp_server.engine.exclusive import Sliced, Telling, Work
from patchclamp_server.errors import InvalidArgument
from patchclamp_server.model.decoder import Decoder
from patchclamp_server.model.info import ModelInfo
from patchclamp_server.model.sites import Site
from patchclamp_server.text.prompt import PromptEncoder

# It is relative to the norm of states, in float32.
ROUNDING = 1e-5
MEASURE = (
    "held-out texts on the right side of the midpoint, by their largest token; beside it random directions, and in "
    "baselines the difference of means at the best layer"
)


@dataclass(frozen=True, eq=False)
class ReftR1:
    """`layers` are 0-based, ascending, and at least one. `texts` are given instead of pairs."""

    pairs: tuple[TokenPair, ...]
    texts: TextSides | None
    site: Site
    layers: tuple[int, ...]
    training: Training = field(default_factory=Training)
    holdout_fraction: float = 0.25
    seed: int = 0
    description: str = ""
    tags: Tags = NO_TAGS


@dataclass(frozen=True, eq=False)
class _Layer:
    vector: Tensor
    evidence: LayerEvidence


async def reft_r1(
    engine: Engine, store: ArtifactStore, info: ModelInfo, prompts: PromptEncoder, job: ReftR1
) -> AsyncGenerator[Progress | Result, None]:
    """Yields progress, then the result, of a job at the engine's exclusive door. Stages are "training of layer <l>",
    counted in steps, and "evidence", counted in layers.

    Raises InvalidArgument for what does not fit into memory, and for a layer where there is no direction to begin with.
    """
    split, spec = Split(job.holdout_fraction, job.seed), engine.model.decoder.spec
    if job.texts is None:
        texts = of_pairs(job.pairs, split, spec)
    else:
        texts = await of_texts(prompts, job.texts, split, spec)
    steps, found = Steps("evidence", len(job.layers)), list[_Layer]()
    events: AsyncGenerator[Progress | _Layer, None] = exclusively(engine, _work(engine.model.decoder, job, texts))
    async with aclosing(events) as told:
        async for event in told:
            if isinstance(event, Progress):
                yield event
                continue
            found.append(event)
            yield steps.advance()
    evidence = [each.evidence for each in found]
    best = best_layer(evidence)
    at_best = evidence[job.layers.index(best)].training
    assert at_best is not None
    yield await stored(
        store,
        info,
        job,
        {each.evidence.layer: each.vector for each in found},
        Card(
            tuple(evidence),
            best,
            MEASURE,
            warnings(evidence),
            {"difference_of_means": at_best.difference_accuracy},
        ),
        method="reft_r1",
        parameters={"top_k": TOP_K, "sparsity": SPARSITY, **asdict(job.training)},
        source=texts.described,
        evidence={**texts.numbers, "random_directions": RANDOM_DIRECTIONS},
    )


def _work(decoder: Decoder, job: ReftR1, texts: DividedSides) -> Work[Progress | _Layer]:
    model = DifferentiableModel.of(decoder)
    for layer in job.layers:
        # In a work of its own: the states of a layer are let go of before those of the next are kept.
        yield (yield from _trained(model, job, texts, Place(layer, job.site)))


def _trained(model: DifferentiableModel, job: ReftR1, texts: DividedSides, at: Place) -> Telling[Progress, _Layer]:
    training = yield from _sides(model, texts.training, at)
    heldout = yield from _sides(model, texts.heldout, at)
    check_start(training, at.layer, texts.field)
    trained = yield from train_direction(model, training, heldout, at, job.training, job.seed)
    vector = trained.best * mean_strength(training, trained.best)
    if not (vector.any() and vector.isfinite().all()):
        raise InvalidArgument("training", f"the direction of layer {at.layer} was lost; try a smaller learning_rate")
    evidence = yield from measured(model, vector, training, heldout, at, len(trained.losses), job.seed)
    return _Layer(vector.cpu(), evidence)


def check_start(sides: Sides, layer: int, field: str) -> None:
    """Refuses what no gradient leads away from."""
    difference = difference_of_means(sides)
    # Rounding leaves something of equal sides: the batch a text runs in moves last bits.
    if difference.norm() <= ROUNDING * mean_norm(sides):
        raise InvalidArgument(field, f"layer {layer} has no direction: both sides have the same mean state there")
    if not mean_strength(sides, torch.nn.functional.normalize(difference, dim=0)):
        message = "no token of a positive projects on the difference of means, from which training begins"
        raise InvalidArgument(field, f"layer {layer} has no direction: {message}")


def _sides(model: DifferentiableModel, texts: Texts, at: Place) -> Sliced[Sides]:
    positive = yield from kept_texts(model, texts.positive, at)
    return Sides(positive, (yield from kept_states(model, texts.negative, at)))
