"""A probability that a probe serves, held against what came, beside the base rate.

The texts are passages of the Brown corpus, one of a document: fiction or informative prose. TrainProbe trains,
calibrates and reports on some documents; passages of others are then sent as requests, each with a readout of the
probe, and the served probability of the last token is what is judged. Brier score: mean squared error of the
probability; of the base rate: the same of always saying the share of fiction among the documents of the training.
Calibration error: mean over texts of |mean probability - share of fiction| of their bins. Right probabilities have one
too where texts are few: labels drawn by the probabilities say how large.
"""

import random
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np
from brown import DESCRIPTION, brown_directory
from neurons.shown import say, shows_progress

from patchclamp import Client
from patchclamp.programs import Program, last, read_probe
from patchclamp_server.analysis.calibration import reliability
from patchclamp_server.analysis.neurons.intervals import RESAMPLES
from patchclamp_server.analysis.steering.detection.ranking import auroc
from vectors.effects import IN_FLIGHT

TAG = TARGET = "fiction"
OTHER = "informative"
# Genres of the corpus by the letter of a document's name.
FICTION = "klmnpr"
Texts = Mapping[str, Sequence[str]]


@dataclass(frozen=True)
class Sizes:
    """`words` of a passage; `training`: share of the documents that the training has; `documents` at most of all."""

    words: int = 30
    training: float = 0.6
    documents: int = 500
    layers: tuple[int, ...] = (15,)


def brown_passages(sizes: Sizes) -> list[tuple[str, str]]:
    """(label, passage), in a drawn order: words from the middle of each document, from the beginning of a sentence."""
    paths = sorted(brown_directory().glob("*.txt"))
    random.Random(0).shuffle(paths)
    found = []
    for path in paths[: sizes.documents]:
        words = path.read_text(encoding="utf-8").split()
        middle = len(words) // 2
        start = next((i + 1 for i in range(middle, len(words)) if words[i].endswith((".", "?", "!"))), middle)
        passage = " ".join(words[start : start + sizes.words])
        found.append((TARGET if path.stem[1] in FICTION else OTHER, passage))
    return found


def measure(client: Client, passages: Sequence[tuple[str, str]], sizes: Sizes) -> dict[str, Any]:
    n = round(sizes.training * len(passages))
    texts = {label: [text for own, text in passages[:n] if own == label] for label in (TARGET, OTHER)}
    trained = client.train_probe(texts, target=TARGET, layers=sizes.layers, tags=[TAG], replace_tags=True).result(
        shows_progress
    )
    say(f"trained on {n} passages: Brier {trained.report.brier:.4f}, base rate {trained.report.brier_base_rate:.4f}")
    probabilities = served(client, [text for _, text in passages[n:]])
    is_target = np.array([label == TARGET for label, _ in passages[n:]])
    found = judged(probabilities, is_target, base=len(texts[TARGET]) / n)
    say(f"served of {len(is_target)} others: Brier {found['brier']:.4f}, base rate {found['brier_base_rate']:.4f}")
    return {
        "text": DESCRIPTION,
        "sizes": vars(sizes),
        "layers": list(trained.layers),
        "report": trained.report.to_dict(),
        "served": found,
        "warnings": list(trained.warnings),
    }


def served(client: Client, texts: Sequence[str]) -> np.ndarray:
    """The probability that comes with the last token of each text."""
    program = Program(readouts=read_probe(TAG, scope=last(1)))

    def of(text: str) -> float:
        result = client.generate(text, program=program, max_tokens=0).result()
        return float(result.prompt_readouts[-1].values[0])

    with ThreadPoolExecutor(IN_FLIGHT) as pool:
        return np.array(list(pool.map(of, texts)))


def judged(p: np.ndarray, is_target: np.ndarray, base: float) -> dict[str, Any]:
    """With names of ProbeReport. The interval is of the Brier score less that of the base rate, over texts."""
    y = is_target.astype(np.float64)
    errors, of_base = (p - y) ** 2, (base - y) ** 2
    drawn = np.random.default_rng(0).integers(len(y), size=(RESAMPLES, len(y)))
    low, high = np.quantile((errors - of_base)[drawn].mean(1), [0.025, 0.975])
    accuracy = float(((p >= 0.5) == is_target).mean())
    draws = np.random.default_rng(0).random((RESAMPLES, len(p))) < p
    by_chance = float(np.quantile([calibration_error(p, draw) for draw in draws], 0.95))
    return {
        "texts": len(y),
        "accuracy": round(accuracy, 4),
        "base_rate": round(float(max(1 - y.mean(), y.mean())), 4),
        "brier": round(float(errors.mean()), 4),
        "brier_base_rate": round(float(of_base.mean()), 4),
        "less_than_base_rate": {"low": round(float(low), 4), "high": round(float(high), 4)},
        "auroc": round(auroc(p, is_target), 4),
        "calibration_error": round(calibration_error(p, is_target), 4),
        "calibration_error_by_chance": round(by_chance, 4),
        "reliability": [vars(each) for each in reliability(p, is_target)],
    }


def calibration_error(p: np.ndarray, is_target: np.ndarray) -> float:
    bins = reliability(p, is_target)
    return sum(each.texts * abs(each.mean_probability - each.share) for each in bins) / len(p)
