"""Calibrates a vector: what it does at layers and strengths, and what it costs, beside random vectors and a prompt.

    vector      h edited by v at one layer, at each strength
    random      the same with random vectors of the norm of v, normally distributed
    prompt      no edit, an instruction before the prompt
    unsteered   no edit

Each arm writes a greedy text after every prompt. Effects: effects.py; coherence: texts.py and coherence.py; the safe
range of a layer and the knee: knee.py. The vector is stored anew with all of it in its evidence card, under the name of
the application, where Generate finds the range that it warns by.

Source: the comparison with prompting and the choice of a factor follow Wu et al. 2025, AxBench: Steering LLMs? Even
Simple Baselines Outperform Sparse Autoencoders.
"""

import asyncio
from collections.abc import AsyncGenerator, Mapping, Sequence
from contextlib import aclosing
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from patchclamp_server.analysis.progress import Progress, Steps
from patchclamp_server.analysis.steering.calibration.applications import (
    STEPS,
    activation_norms,
    default_strengths,
    steering_program,
)
from patchclamp_server.analysis.steering.calibration.effects import ClassifierEffect, Effect, ProjectionEffect
from patchclamp_server.analysis.steering.calibration.knee import Dose, Knee, best_knee, safe_range
from patchclamp_server.analysis.steering.calibration.points import (
    Arm,
    CalibrationPrompt,
    Cell,
    DosePoint,
    Measurement,
)
from patchclamp_server.artifacts.store import ArtifactStore
from patchclamp_server.artifacts.types import NO_TAGS, Artifact, ArtifactInfo, ArtifactKind, Tags
from patchclamp_server.engine.engine import Engine
from patchclamp_server.errors import InvalidArgument
from patchclamp_server.interventions.bound import BoundProgram
from patchclamp_server.interventions.program import Scope
from patchclamp_server.interventions.safe_strengths import CALIBRATION, Application, SafeRange
from patchclamp_server.model.info import ModelInfo

MAX_REQUESTS = 200_000
# Of balanced held-out accuracy: below it the classifier says little of the concept.
MIN_CLASSIFIER_ACCURACY = 0.7


@dataclass(frozen=True, eq=False)
class Calibration:
    """What to calibrate. `strengths`: of every layer, ascending; without any, those of applications.py."""

    vector: Artifact
    application: Application
    layers: tuple[int, ...]
    strengths: tuple[float, ...]
    prompts: tuple[CalibrationPrompt, ...]
    effect: Effect
    max_tokens: int = 32
    scope: Scope = field(default_factory=Scope)
    random_vectors: int = 3
    max_perplexity_ratio: float = 2.0
    max_repetition: float = 0.3
    seed: int = 0
    tags: Tags = NO_TAGS


@dataclass(frozen=True)
class Calibrated:
    """`layer`, `strength`: of the knee; where no safe strength has an effect, of the first layer, and 0."""

    artifact: ArtifactInfo
    points: tuple[DosePoint, ...]
    safe: Mapping[int, SafeRange]
    layer: int
    strength: float
    prompt_wins: bool
    warnings: tuple[str, ...]


async def calibrate(
    engine: Engine, store: ArtifactStore, info: ModelInfo, job: Calibration
) -> AsyncGenerator[Progress | DosePoint | Calibrated, None]:
    """Yields progress in requests, each point when it is measured, then the calibration.

    Ending the iteration early cancels what the engine still computes. Raises InvalidArgument where there would be more
    than MAX_REQUESTS requests, and what a request is refused with or fails with.
    """
    site = job.vector.info.site
    assert site is not None
    measurement = Measurement(engine, job.prompts, job.max_tokens, job.effect, job.seed)
    baselines = [Cell(Arm.UNSTEERED, (None,))]
    if job.prompts[0].instructed is not None:
        baselines.append(Cell(Arm.PROMPT, (None,)))
    n_strengths = sum(s != 0.0 for s in job.strengths) or STEPS
    per_program = measurement.requests([Cell(Arm.VECTOR, (_any_program(job, info),))])
    total = measurement.requests(baselines) + len(job.layers) * n_strengths * (1 + job.random_vectors) * per_program
    if total > MAX_REQUESTS:
        message = f"{total} requests at all layers, strengths, vectors and prompts; at most {MAX_REQUESTS} are run"
        raise InvalidArgument("strengths", message)
    strengths = dict.fromkeys(job.layers, job.strengths)
    if not job.strengths:
        norms: dict[int, float] = {}
        steps = Steps("norms", len(job.prompts))
        prompts = [prompt.plain for prompt in job.prompts]
        async with aclosing(activation_norms(engine, site, job.layers, prompts)) as measured:
            async for each in measured:
                if isinstance(each, int):
                    yield steps.advance(each)
                else:
                    norms = each
        for layer in job.layers:
            v = float(job.vector.direction(layer).double().norm())
            strengths[layer] = default_strengths(job.application, v, norms[layer])

    points: list[DosePoint] = []
    steps = Steps("texts", total)
    for cells in (baselines, *(_cells(job, layer, strengths[layer], info) for layer in job.layers)):
        async with aclosing(measurement.points(cells)) as measured_points:
            async for event in measured_points:
                if isinstance(event, int):
                    yield steps.advance(event)
                    continue
                for point in event:
                    points.append(point)
                    yield point
        if cells is not baselines and 0.0 in strengths[cells[0].layer]:
            # Of no strength nothing comes but what the unsteered model says.
            for arm in (Arm.VECTOR, Arm.RANDOM):
                points.append(replace(points[0], arm=arm, layer=cells[0].layer))
                yield points[-1]
    yield await asyncio.to_thread(_stored, store, info, job, points)


def _any_program(job: Calibration, info: ModelInfo) -> BoundProgram:
    layer = job.layers[0]
    site = job.vector.info.site
    assert site is not None
    return steering_program(job.application, job.vector.direction(layer), 1.0, site, layer, job.scope, info)


def _cells(job: Calibration, layer: int, strengths: Sequence[float], info: ModelInfo) -> list[Cell]:
    site = job.vector.info.site
    assert site is not None
    v = job.vector.direction(layer).float()
    cells = []
    for arm, vectors in ((Arm.VECTOR, [v]), (Arm.RANDOM, random_vectors(v, job.random_vectors, layer, job.seed))):
        for strength in strengths:
            if strength != 0.0:
                programs = [
                    steering_program(job.application, each, strength, site, layer, job.scope, info) for each in vectors
                ]
                cells.append(Cell(arm, tuple(programs), layer, strength))
    return cells


def random_vectors(v: Tensor, n: int, layer: int, seed: int) -> list[Tensor]:
    """Returns n random vectors of the norm of v, which depend on the layer and the seed."""
    generator = torch.Generator().manual_seed((seed + layer) % 2**64)
    drawn = torch.randn(n, len(v), generator=generator, dtype=torch.float64)
    return list((drawn * (v.double().norm() / drawn.norm(dim=1))[:, None]).float())


def _stored(store: ArtifactStore, info: ModelInfo, job: Calibration, points: list[DosePoint]) -> Calibrated:
    unsteered = next(p for p in points if p.arm is Arm.UNSTEERED)
    doses = {layer: _doses(job, layer, points, unsteered) for layer in job.layers}
    safe = {layer: safe_range(own) for layer, own in doses.items()}
    knee = best_knee(doses)
    layer, strength = (job.layers[0], 0.0) if knee is None else (knee.layer, knee.dose.strength)
    prompted = next((p for p in points if p.arm is Arm.PROMPT), None)
    reached = unsteered.effect.mean if knee is None else unsteered.effect.mean + knee.dose.effect
    prompt_wins = prompted is not None and _is_coherent(job, prompted, unsteered) and prompted.effect.mean > reached
    warnings = _warnings(job, points, unsteered, safe, knee)
    card = {
        "site": job.vector.info.site.value if job.vector.info.site else "",
        "layer": layer,
        "strength": strength,
        "safe": [{"layer": at, "low": found.low, "high": found.high} for at, found in safe.items()],
        "prompt_wins": prompt_wins,
        "effect": {"measure": job.effect.name, **job.effect.card()},
        "max_perplexity_ratio": job.max_perplexity_ratio,
        "max_repetition": job.max_repetition,
        "prompts": len(job.prompts),
        "max_tokens": job.max_tokens,
        "random_vectors": job.random_vectors,
        # Text, since JSON and Struct keep numbers as doubles.
        "seed": str(job.seed),
        "points": [_card(point) for point in points],
        "warnings": list(warnings),
    }
    old = job.vector.info
    before = old.evidence.get(CALIBRATION)
    calibrations = {**(before if isinstance(before, dict) else {}), job.application.value: card}
    artifact = store.put(
        ArtifactKind.VECTOR,
        job.vector.tensors,
        model_fingerprint=info.fingerprint,
        site=old.site,
        description=old.description,
        provenance={**old.provenance, "calibrated_from": old.id},
        evidence={**old.evidence, CALIBRATION: calibrations},
        tags=job.tags,
    )
    return Calibrated(artifact, tuple(points), safe, layer, strength, prompt_wins, warnings)


def _doses(job: Calibration, layer: int, points: Sequence[DosePoint], unsteered: DosePoint) -> list[Dose]:
    own = [p for p in points if p.layer == layer]
    random = {p.strength: p.effect.mean for p in own if p.arm is Arm.RANDOM}
    base = unsteered.effect.mean
    return [
        Dose(p.strength, _is_coherent(job, p, unsteered), p.effect.mean - base, random[p.strength] - base)
        for p in own
        if p.arm is Arm.VECTOR
    ]


def _is_coherent(job: Calibration, point: DosePoint, unsteered: DosePoint) -> bool:
    ratio = point.perplexity.mean / unsteered.perplexity.mean
    return ratio <= job.max_perplexity_ratio and point.repetition.mean <= job.max_repetition


def _warnings(
    job: Calibration,
    points: Sequence[DosePoint],
    unsteered: DosePoint,
    safe: Mapping[int, SafeRange],
    knee: Knee | None,
) -> tuple[str, ...]:
    """Returns what whoever uses the calibration should know first, a sentence each."""
    found = []
    if unsteered.repetition.mean > job.max_repetition:
        found.append(
            f"the unsteered text repeats {unsteered.repetition.mean:.2f} of its 4-grams, more than max_repetition "
            f"{job.max_repetition:g}: raise it, or let the prompts ask for more than the model repeats"
        )
    if none := [str(layer) for layer, own in safe.items() if own.low == own.high]:
        found.append(f"no strength that was tried is safe at layers {', '.join(none)}: try lower ones")
    if knee is None:
        found.append("no safe strength has more effect than none: the knee is given as strength 0")
    else:
        at = [p for p in points if (p.layer, p.strength) == (knee.layer, knee.dose.strength)]
        own, random = (next(p.effect for p in at if p.arm is arm) for arm in (Arm.VECTOR, Arm.RANDOM))
        if own.low <= random.high:
            found.append("the effect at the knee is not told from that of random vectors: their intervals overlap")
    if isinstance(job.effect, ProjectionEffect):
        found.append("the effect is the projection on the vector, which says least: it is what the vector adds")
    if isinstance(job.effect, ClassifierEffect):
        accuracy = job.effect.classifier.heldout_accuracy
        if accuracy < MIN_CLASSIFIER_ACCURACY:
            found.append(
                f"the classifier tells only {accuracy:.2f} of held-out texts right (both labels weighed alike)"
            )
    return tuple(found)


def _card(point: DosePoint) -> dict[str, Any]:
    """Returns a point without its example; an interval is [mean, low, high], to six digits."""
    intervals = {
        name: [float(f"{x:.6g}") for x in (own.mean, own.low, own.high)]
        for name in ("effect", "perplexity", "repetition", "distinct", "divergence")
        for own in (getattr(point, name),)
    }
    return {"arm": point.arm.value, "layer": point.layer, "strength": point.strength, **intervals}
