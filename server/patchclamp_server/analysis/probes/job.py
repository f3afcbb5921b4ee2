"""Trains a probe: labelled texts → pooled states → layers → fit → calibration → report → stored artifact."""

import asyncio
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from dataclasses import asdict, dataclass, field, replace
from typing import Any, TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray

from patchclamp_server.analysis.calibration import platt
from patchclamp_server.analysis.neurons.texts import TextSource
from patchclamp_server.analysis.probes.code_length import code_length_ratio
from patchclamp_server.analysis.probes.fitting import Examples, Standardised, fitted, side_by_side
from patchclamp_server.analysis.probes.method import Doubles, Fit
from patchclamp_server.analysis.probes.registry import METHODS
from patchclamp_server.analysis.probes.report import ProbeReport, classifier_report, r_squared
from patchclamp_server.analysis.probes.texts import (
    CALIBRATION,
    REPORT,
    TRAINING,
    LabelledStates,
    labelled_states,
    numbers_of,
)
from patchclamp_server.analysis.probes.variance_share import variance_share
from patchclamp_server.analysis.progress import Progress
from patchclamp_server.artifacts.probes import PROTOTYPE, RIDGE, Probe, log_odds, probe_of
from patchclamp_server.artifacts.store import ArtifactStore
from patchclamp_server.artifacts.types import NO_TAGS, ArtifactInfo, ArtifactKind, Tags
from patchclamp_server.engine.engine import Engine
from patchclamp_server.engine.request import Capture
from patchclamp_server.interventions.pooling import Pooling
from patchclamp_server.interventions.program import Scope
from patchclamp_server.model.info import ModelInfo
from patchclamp_server.model.sites import Site
from patchclamp_server.text.prompt import PromptEncoder

# Times that labels are dealt anew for the selectivity.
CONTROLS = 5
FEW_TEXTS = 20
# A code that saves less than this share has learnt next to nothing.
LITTLE_SAVED = 0.05
Tensors: TypeAlias = dict[str, torch.Tensor]


@dataclass(frozen=True, eq=False)
class ProbeTraining:
    """What to train. `target` is the number of a label, 0 of ridge; no `layers` means the best one; with `strength`
    None cross-validation chooses it."""

    method: str
    texts: TextSource
    target: int
    site: Site
    layers: tuple[int, ...] = ()
    pooling: Pooling = Pooling.LAST_TOKEN
    scope: Scope = field(default_factory=Scope)
    strength: float | None = None
    holdout_fraction: float = 0.4
    seed: int = 0
    description: str = ""
    tags: Tags = NO_TAGS


@dataclass(frozen=True)
class TrainedProbe:
    """`by_layer`: where the layer was chosen, accuracy or R² of a probe on each alone, on the texts that calibrate."""

    artifact: ArtifactInfo
    labels: tuple[str, ...]
    layers: tuple[int, ...]
    report: ProbeReport
    by_layer: tuple[tuple[int, float], ...]
    warnings: tuple[str, ...]


async def train_probe(
    engine: Engine, store: ArtifactStore, info: ModelInfo, prompts: PromptEncoder, job: ProbeTraining
) -> AsyncGenerator[Progress | TrainedProbe, None]:
    """Yields progress, then the stored probe. Ending the iteration early cancels what the engine still computes.

    Stages are "activations", counted in texts, "layers", where the layer is chosen, and "controls", counted in labels
    that were dealt anew. Raises InvalidArgument on "texts" and "scope".
    """
    layers = job.layers or tuple(range(info.n_layers))
    labels = job.texts.corpus.labels
    numbers = numbers_of(labels) if job.method == RIDGE else None
    capture = Capture(job.site, layers, job.pooling, job.scope)
    found: LabelledStates | None = None
    collected = labelled_states(
        engine, prompts, job.texts, capture, fraction=job.holdout_fraction, seed=job.seed, numbers=numbers
    )
    async with aclosing(collected) as events:
        async for event in events:
            if isinstance(event, Progress):
                yield event
            else:
                found = event
    assert found is not None
    by_layer: list[tuple[int, float]] = []
    rows = list(range(len(layers)))
    if not job.layers:
        ranked = []
        for row in rows:
            score, loss = await asyncio.to_thread(_tried, found, job, row)
            by_layer.append((layers[row], score))
            ranked.append((score, -loss, row))
            yield Progress("layers", row + 1, len(rows))
        rows = [max(ranked)[2]]
    layers = tuple(layers[row] for row in rows)

    training, examples = found.part(TRAINING)
    states = side_by_side(training, rows)
    inputs, fit, strength = await asyncio.to_thread(
        fitted, METHODS[job.method], states, examples, job.strength, job.seed
    )
    tensors = _tensors(inputs, fit, layers)
    provenance = _provenance(info, job, labels, layers, strength, found)
    probe = probe_of(provenance, tensors)
    if job.method != RIDGE:
        own, calibrating = _scored(probe, found, rows, CALIBRATION)
        calibration = platt(log_odds(own, probe.target), calibrating.y == probe.target)
        tensors["calibration"] = torch.tensor(calibration, dtype=torch.float64)
        probe = probe_of(provenance, tensors)
    report = await asyncio.to_thread(_reported, probe, found, rows, job, inputs, examples, strength)
    controls = []
    for draw in range(CONTROLS):
        controls.append(await asyncio.to_thread(_control, found, rows, job, strength, draw))
        yield Progress("controls", draw + 1, CONTROLS)
    score = report.r_squared if job.method == RIDGE else report.accuracy
    report = replace(report, selectivity=score - float(np.mean(controls)))
    warned = _warnings(report, job)
    artifact = await asyncio.to_thread(
        store.put,
        ArtifactKind.PROBE,
        tensors,
        model_fingerprint=info.fingerprint,
        description=job.description,
        provenance=provenance,
        evidence={
            "report": asdict(report),
            "by_layer": [{"layer": layer, "score": score} for layer, score in by_layer],
            "warnings": list(warned),
        },
        tags=job.tags,
    )
    yield TrainedProbe(artifact, probe.labels, layers, report, tuple(by_layer), warned)


def _tried(found: LabelledStates, job: ProbeTraining, row: int) -> tuple[float, float]:
    """Returns score and loss of a probe on one layer alone, on the texts that calibrate."""
    method = METHODS[job.method]
    training, examples = found.part(TRAINING)
    inputs, fit, _ = fitted(method, side_by_side(training, [row]), examples, job.strength, job.seed)
    others, judged = found.part(CALIBRATION)
    scores = fit.scores(inputs.turned(side_by_side(others, [row])))
    return _score(scores, judged), float(method.loss(scores, judged.y).mean())


def _score(scores: Doubles, judged: Examples) -> float:
    """Returns accuracy, or R² of numbers."""
    if judged.n_classes == 1:
        return r_squared(scores[:, 0], judged.y)
    return float((scores.argmax(axis=1) == judged.y).mean())


def _scored(probe: Probe, found: LabelledStates, rows: Sequence[int], part: int) -> tuple[Doubles, Examples]:
    """Returns the scores of the probe, as it is stored, for the texts of a part."""
    states, examples = found.part(part)
    return probe.scores({layer: states[:, row] for layer, row in zip(probe.layers, rows, strict=True)}), examples


def _reported(
    probe: Probe,
    found: LabelledStates,
    rows: Sequence[int],
    job: ProbeTraining,
    inputs: Standardised,
    training: Examples,
    strength: float,
) -> ProbeReport:
    scores, judged = _scored(probe, found, rows, REPORT)
    if job.method == RIDGE:
        report = ProbeReport(len(judged), r_squared=r_squared(scores[:, 0], judged.y))
    else:
        ratio = code_length_ratio(METHODS[job.method], inputs.z, training, strength, job.seed)
        report = replace(classifier_report(probe, scores, judged.y, training), code_length_ratio=ratio)
    states = side_by_side(found.part(REPORT)[0], rows)
    return replace(report, variance_share=variance_share(states, judged.y, judged.n_classes))


def _control(found: LabelledStates, rows: Sequence[int], job: ProbeTraining, strength: float, draw: int) -> float:
    """Returns the score of the same probe on labels dealt anew to the documents, those of training and of the report
    each among themselves."""
    generator = np.random.default_rng([job.seed, draw])
    training, examples = found.part(TRAINING)
    states, judged = found.part(REPORT)
    dealt = replace(examples, y=_dealt(examples, generator))
    inputs, fit, _ = fitted(METHODS[job.method], side_by_side(training, rows), dealt, strength, job.seed)
    scores = fit.scores(inputs.turned(side_by_side(states, rows)))
    return _score(scores, replace(judged, y=_dealt(judged, generator)))


def _dealt(examples: Examples, generator: np.random.Generator) -> NDArray[np.float64]:
    """Returns the labels of documents in a random order, for each text."""
    _, first, of = np.unique(examples.documents, return_index=True, return_inverse=True)
    shuffled: NDArray[np.float64] = generator.permutation(examples.y[first])[of]
    return shuffled


def _tensors(inputs: Standardised, fit: Fit, layers: Sequence[int]) -> Tensors:
    """Returns what is stored, in float64: "calibration" is added later."""
    tensors: Tensors = {}
    kind, matrix = ("weight", fit.matrix) if fit.centres is None else ("centres", fit.centres)
    parts = {"mean": inputs.mean, "scale": inputs.scale, kind: inputs.back(matrix)}
    for name, values in parts.items():
        for layer, own in zip(layers, np.split(values, len(layers), axis=-1), strict=True):
            tensors[f"layer.{layer}.{name}"] = torch.from_numpy(np.ascontiguousarray(own))
    if fit.temperature is None:
        tensors["bias"] = torch.from_numpy(fit.bias)
    else:
        tensors["temperature"] = torch.tensor([fit.temperature], dtype=torch.float64)
    return tensors


def _provenance(
    info: ModelInfo,
    job: ProbeTraining,
    labels: tuple[str, ...],
    layers: tuple[int, ...],
    strength: float,
    found: LabelledStates,
) -> dict[str, Any]:
    parts = {name: int((found.parts == part).sum()) for part, name in enumerate(("training", "calibration", "report"))}
    named = {} if job.method == RIDGE else {"labels": list(labels), "target": labels[job.target]}
    return {
        "method": job.method,
        "site": job.site.value,
        "layers": list(layers),
        **named,
        "parameters": {
            "pooling": job.pooling.value,
            "scope": repr(job.scope) if job.scope != Scope() else "",
            "temperature" if job.method == PROTOTYPE else "penalty": strength,
            "chosen": job.strength is None,
            "holdout_fraction": job.holdout_fraction,
            # As text: JSON and google.protobuf.Struct keep numbers as doubles, and a seed has 64 bits.
            "seed": str(job.seed),
        },
        "texts": parts,
        "texts_digest": job.texts.corpus.digest,
        "model": info.name,
    }


def _warnings(report: ProbeReport, job: ProbeTraining) -> tuple[str, ...]:
    """Returns what whoever uses the probe should know first, a sentence each."""
    found = []
    if report.texts < FEW_TEXTS:
        found.append(f"the report is of {report.texts} texts: its figures are rough; give more texts")
    if job.method == RIDGE:
        if report.r_squared <= 0.0:
            found.append(f"R² is {report.r_squared:.2f} on texts it has not seen: the mean says as much")
        return tuple(found)
    if report.brier >= report.brier_base_rate:
        beside = f"{report.brier:.3f} beside {report.brier_base_rate:.3f}"
        found.append(f"the probability says no more than the base rate (Brier {beside}) on texts it has not seen")
    if report.code_length_ratio > 1.0 - LITTLE_SAVED:
        ratio = f"{report.code_length_ratio:.2f}"
        found.append(f"labels hardly get shorter by the activations (code length ratio {ratio}), as random ones")
    return tuple(found)
