"""Detects a concept: how well vectors, probes and features tell the texts of a label from all others, by layer and
pooling (detectors.py).

Part of the labelled texts calibrates probabilities (analysis/calibration.py); AUROC, average precision, Brier score and
reliability are of the others. Beside them: the AUROC of random directions at the same place, each turned by the texts
of the calibration so that the label projects higher, and the Brier score of the base rate of those texts.

Source: concept detection of Wu et al. 2025, AxBench: Steering LLMs? Even Simple Baselines Outperform Sparse
Autoencoders; difference of means is the baseline to beat there.
"""

import asyncio
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from patchclamp_server.analysis.calibration import Calibration, ReliabilityBin, platt, reliability
from patchclamp_server.analysis.neurons.intervals import Interval
from patchclamp_server.analysis.neurons.localize.holdout import held_out
from patchclamp_server.analysis.neurons.texts import TextSource
from patchclamp_server.analysis.progress import Progress
from patchclamp_server.analysis.steering.detection.detectors import Detector, Rows
from patchclamp_server.analysis.steering.detection.ranking import auroc, ranking
from patchclamp_server.analysis.steering.detection.scores import Joined, Place, ScoredText, scored_texts
from patchclamp_server.artifacts.corpora import UNLABELLED
from patchclamp_server.engine.engine import Engine
from patchclamp_server.errors import InvalidArgument
from patchclamp_server.interventions.pooling import Pooling
from patchclamp_server.model.sites import Site
from patchclamp_server.text.prompt import PromptEncoder

Floats = NDArray[np.float64]
Bools = NDArray[np.bool_]
RANDOM_DIRECTIONS = 8
# Of each kind, in either part.
MIN_TEXTS = 2


class Column(NamedTuple):
    """One score of each text: of a detector at a layer, pooled."""

    detector: str
    layer: int
    pooling: Pooling
    feature: int | None = None


@dataclass(frozen=True, eq=False)
class Detection:
    """`target`: number of the label; None: texts are scored alone."""

    detectors: tuple[Detector, ...]
    texts: TextSource
    target: int | None
    poolings: tuple[Pooling, ...]
    calibration_fraction: float = 0.5
    seed: int = 0

    @property
    def columns(self) -> tuple[Column, ...]:
        """By detector, then pooling."""
        return tuple(
            Column(detector.name, detector.layer, pooling, detector.feature)
            for detector in self.detectors
            for pooling in self.poolings
        )


@dataclass(frozen=True)
class DetectedText:
    text: int
    label: str
    scores: tuple[float, ...]


@dataclass(frozen=True)
class Quality:
    """`brier`: mean (p - y)^2 of the texts that are not of the calibration."""

    auroc: Interval
    average_precision: Interval
    random_auroc: float
    calibration: Calibration
    brier: float
    brier_base_rate: float
    reliability: tuple[ReliabilityBin, ...]


@dataclass(frozen=True)
class Detected:
    """`qualities`: of each column, None without labels. `best`: that with the largest AUROC."""

    columns: tuple[Column, ...]
    qualities: tuple[Quality, ...] | None
    best: int
    texts: int
    warnings: tuple[str, ...]


async def detect(
    engine: Engine, prompts: PromptEncoder, job: Detection
) -> AsyncGenerator[Progress | DetectedText | Detected, None]:
    """Yields progress in texts and the scores of each as soon as it has run, then how well each column detects.

    Ending the iteration early cancels what the engine still computes. Raises InvalidArgument on "texts" for too few
    texts of a kind; nothing is run then, unless `max_tokens` leaves them out.
    """
    labels = job.texts.corpus.document_labels
    if job.target is not None:
        _check(labels, job)
    reading = _reading(job)
    found: list[ScoredText] = []
    total = len(job.texts.corpus)
    names = job.texts.corpus.labels
    async with aclosing(
        scored_texts(engine, prompts, job.texts, reading.places, job.poolings, reading.joined)
    ) as scored:
        async for text in scored:
            found.append(text)
            label = "" if text.label == UNLABELLED else names[text.label]
            yield DetectedText(text.document, label, tuple(float(score.of(text)) for score in reading.scores))
            yield Progress("texts", len(found), total)
    if job.target is None or not found:
        yield Detected(job.columns, None, 0, len(found), ())
        return
    yield await asyncio.to_thread(_judged, job, found, reading.scores)


@dataclass(frozen=True, eq=False)
class _Score:
    """Finds a score and those of random directions in what was read of a text: at places, in some columns of each, or
    among what is joined."""

    detector: Detector
    places: tuple[tuple[int, slice], ...]
    pooling: int
    joined: int | None = None

    def of(self, text: ScoredText) -> float:
        if self.joined is not None:
            return float(text.largest[self.joined][0])
        parts = [text.scores[at][self.pooling, columns].numpy() for at, columns in self.places]
        join = self.detector.join
        return float(parts[0][0]) if join is None else float(join(np.sum(parts, axis=0)[None])[0])

    def random(self, text: ScoredText) -> Floats:
        if self.joined is not None:
            found: Floats = text.largest[self.joined][1:].numpy()
            return found
        parts = [text.scores[at][self.pooling, -RANDOM_DIRECTIONS:].numpy() for at, _ in self.places]
        total: Floats = np.sum(parts, axis=0)
        return total


class _Reading(NamedTuple):
    """What is read of each text, and where the score of each column is in it."""

    places: list[Place]
    joined: list[Joined]
    scores: list[_Score]


def _reading(job: Detection) -> _Reading:
    """The rows of a place are those of its detectors, and random directions last."""
    rows: dict[tuple[Site, int], list[Rows]] = {}
    order: dict[tuple[Site, int], int] = {}
    of_detectors: list[list[tuple[int, slice]]] = []
    for detector in job.detectors:
        own = []
        for layer, each in detector.rows.items():
            at = order.setdefault((detector.site, layer), len(order))
            there = rows.setdefault((detector.site, layer), [])
            start = sum(map(len, there))
            there.append(each)
            own.append((at, slice(start, start + len(each))))
        of_detectors.append(own)
    random = [_random(len(own[0].weight[0]), job.seed + number) for number, own in enumerate(rows.values())]
    places = [
        Place(site, layer, Rows.cat([*own, drawn]))
        for ((site, layer), own), drawn in zip(rows.items(), random, strict=True)
    ]
    joined: list[Joined] = []
    scores: list[_Score] = []
    for detector, parts in zip(job.detectors, of_detectors, strict=True):
        for i, pooling in enumerate(job.poolings):
            if detector.join is None or pooling is not Pooling.MAX:
                scores.append(_Score(detector, tuple(parts), i))
                continue
            both = {
                layer: Rows.cat([each, random[at]])
                for (layer, each), (at, _) in zip(detector.rows.items(), parts, strict=True)
            }
            scores.append(_Score(detector, tuple(parts), i, len(joined)))
            joined.append(Joined(detector.site, both, detector.join, len(both[detector.layer]) - RANDOM_DIRECTIONS))
    return _Reading(places, joined, scores)


def _random(width: int, seed: int) -> Rows:
    drawn = torch.randn(RANDOM_DIRECTIONS, width, generator=torch.Generator().manual_seed(seed % 2**64))
    return Rows.linear(drawn / drawn.norm(dim=1, keepdim=True))


def _check(labels: NDArray[np.int64], job: Detection) -> None:
    calibrates = _calibrating(labels, job)
    known = labels != UNLABELLED
    for name, kind in (("the target", labels == job.target), ("other labels", known & (labels != job.target))):
        fits, rest = int((kind & calibrates).sum()), int((kind & ~calibrates).sum())
        if min(fits, rest) < MIN_TEXTS:
            message = (
                f"{fits} texts of {name} calibrate and {rest} are left to report; expected at least {MIN_TEXTS} each"
            )
            raise InvalidArgument("texts", message)


def _calibrating(labels: NDArray[np.int64], job: Detection) -> Bools:
    """Returns which texts calibrate; those without a label do not."""
    kinds = np.where(labels == UNLABELLED, UNLABELLED, (labels == job.target).astype(np.int64))
    return held_out(kinds, job.calibration_fraction, job.seed)


def _judged(job: Detection, found: Sequence[ScoredText], scores: Sequence[_Score]) -> Detected:
    labels = np.array([text.label for text in found], dtype=np.int64)
    _check(labels, job)
    calibrates, known = _calibrating(labels, job), labels != UNLABELLED
    fits, rest = np.flatnonzero(calibrates), np.flatnonzero(known & ~calibrates)
    is_target = labels == job.target
    qualities = []
    for score in scores:
        own, random = np.array([score.of(text) for text in found]), np.array([score.random(text) for text in found])
        qualities.append(_quality(own, random, is_target, fits, rest, job.seed))
    best = max(range(len(qualities)), key=lambda column: qualities[column].auroc.mean)
    return Detected(job.columns, tuple(qualities), best, len(found), _warnings(qualities[best], len(qualities)))


def _quality(
    scores: Floats, random: Floats, is_target: Bools, fits: NDArray[np.int64], rest: NDArray[np.int64], seed: int
) -> Quality:
    calibration = platt(scores[fits], is_target[fits])
    ranked = ranking(scores[rest], is_target[rest], seed)
    chance = []
    for each in random.T:
        turned = each if auroc(each[fits], is_target[fits]) >= 0.5 else -each
        chance.append(auroc(turned[rest], is_target[rest]))
    p, y = calibration.probabilities(scores[rest]), is_target[rest].astype(np.float64)
    base = float(is_target[fits].mean())
    return Quality(
        ranked.auroc,
        ranked.average_precision,
        float(np.mean(chance)),
        calibration,
        brier=float(np.mean((p - y) ** 2)),
        brier_base_rate=float(np.mean((base - y) ** 2)),
        reliability=reliability(p, is_target[rest]),
    )


def _warnings(best: Quality, columns: int) -> tuple[str, ...]:
    """Returns what to know before a detector is used, a sentence each."""
    found = []
    if best.auroc.low <= best.random_auroc:
        found.append("the best detector is not told from random directions of its place by these texts")
    if columns > 1:
        found.append(f"the best of {columns} is chosen by the texts that it is reported on, and flattered by that")
    if best.brier >= best.brier_base_rate:
        found.append("the probabilities of the best detector are no better than the base rate")
    return tuple(found)
