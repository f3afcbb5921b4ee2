"""Methods by concepts: a vector is found, its strength chosen, and measured on what has not been seen by either.

    found      by ExtractVectors, from the pairs of a concept that are not kept for detection
    chosen     by CalibrateVector, by the log-probability of texts after prompts of its own: layer and strength
    effect     effects.py, on held-out prompts and texts, at that strength; beside random vectors as long, and an
               instruction
    coherence  by CalibrateVector at that strength alone, on text written after the held-out prompts: perplexity of the
               unsteered model over that of its own text, and repetition; beside both. Of the words: the share of texts
               that have one of the concept
    AUROC      by DetectConcept, of the mean projection on texts that no vector was made of; beside the model asked

Strengths are tried as shares of the norm of the activations, so that they mean the same for a vector of any length.
Prompting wins where its effect is larger (the interval of the difference, prompt by prompt, lies on its side of 0) and
its text is as coherent as is demanded of a vector; a vector wins likewise. A vector that was safe at no strength does
not win.
"""

import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from neurons.shown import say, shows_progress

from patchclamp import Client, effects
from patchclamp.names import METHODS
from patchclamp.programs import add
from patchclamp.results import CalibrationResult, DosePoint, ExtractionResult, Interval
from patchclamp_server.analysis.steering.registry import INPUTS
from vectors.concepts import NAMES, Concept, load
from vectors.effects import AFTER_INSTRUCTION, Row, asked, interval, less, preferences, random_edits, rounded

# Of the server, in its order: those that find a vector from two sides of texts.
EXTRACTORS = tuple(name for name, inputs in INPUTS.items() if name in METHODS and {("pairs",), ("texts",)} & {*inputs})
MOST_PERPLEXITY, MOST_REPETITION = 2.0, 0.3
# What a row of a vector or an instruction has an interval of.
MEASURES = ("effect", "perplexity_ratio", "auroc")


@dataclass(frozen=True)
class Sizes:
    """`prompts`: of the held-out ones; `choosing` of those that strengths are chosen with. `tokens` of a text, and of
    one that strengths are chosen with. `changes`: shares of the norm of the activations."""

    concepts: tuple[str, ...] = NAMES
    methods: tuple[str, ...] = EXTRACTORS
    layers: tuple[int, ...] = (12,)
    changes: tuple[float, ...] = (0.15, 0.3, 0.5)
    choosing: int = 6
    choosing_tokens: int = 12
    prompts: int = 12
    tokens: int = 20
    random_vectors: int = 2


def measure(client: Client, sizes: Sizes) -> dict[str, Any]:
    started = time.monotonic()
    rows = {name: _Table(client, load(name), sizes).rows() for name in sizes.concepts}
    return {
        "sizes": vars(sizes),
        "bounds": {"perplexity_ratio": MOST_PERPLEXITY, "repetition": MOST_REPETITION},
        "seconds": round(time.monotonic() - started),
        "concepts": rows,
    }


class _Table:
    """Of one concept. What methods have in common is measured once."""

    def __init__(self, client: Client, concept: Concept, sizes: Sizes) -> None:
        self.client, self.concept, self.sizes = client, concept, sizes
        whole = concept.held_out
        self.held_out = type(whole)(whole.prompts[: sizes.prompts], whole.positive, whole.negative)
        self.plain = preferences(client, self.held_out)
        told = concept.instruction + AFTER_INSTRUCTION
        self.prompted = less(preferences(client, self.held_out, before=told), self.plain)
        self.of_random: dict[tuple[int, float], list[float]] = {}
        self.baselines: dict[str, DosePoint] = {}

    def rows(self) -> Row:
        methods = {name: self._method(name) for name in self.sizes.methods}
        self._detect(methods)
        instructed = {
            "instruction": self.concept.instruction,
            "effect": interval(self.prompted),
            **self._written(self.baselines["prompt"]),
            "auroc": asked(self.client, self.concept),
        }
        for name, row in methods.items():
            row["winner"] = winner(row, instructed)
            say(f"{self.concept.name}, {name}: {shown(row)}; wins: {row['winner']}")
        say(f"{self.concept.name}, instruction: {shown(instructed)}")
        return {
            "pairs": len(self.concept.known),
            "detected_texts": sum(map(len, self.concept.detected.values())),
            "unsteered": self._written(self.baselines["unsteered"]),
            "prompt": instructed,
            "methods": methods,
        }

    def _method(self, name: str) -> Row:
        started = time.monotonic()
        tag = f"{self.concept.name}-{name}"
        found = self._extract(name, tag)
        evidence = {each.layer: each for each in found.layers}
        chosen = [self._choose(tag, layer, evidence[layer]) for layer in self.sizes.layers]
        # Of several layers, each with strengths of its own, the one whose effect gets farthest beyond random vectors.
        best = max(chosen, key=lambda each: (each.strength > 0, _beyond_random(each)))
        is_safe = best.strength > 0
        own = evidence[best.layer]
        strength = best.strength if is_safe else min(point.strength for point in best.curve("vector", best.layer))
        length = strength * own.norm
        by_vector = less(
            preferences(self.client, self.held_out, add(tag, layers=best.layer, strength=strength)), self.plain
        )
        by_random = self._random(best.layer, length)
        points = self._points(tag, best.layer, strength)
        row = {
            "tag": tag,
            "layer": best.layer,
            "strength": strength,
            "change": round(length / own.activation_norm, 3),
            "is_safe": is_safe,
            "heldout_accuracy": round(own.heldout_accuracy, 3),
            "effect": interval(by_vector),
            "random_effect": interval(by_random),
            "beyond_random": interval(less(by_vector, by_random)),
            "beyond_prompt": interval(less(by_vector, self.prompted)),
            **self._written(points["vector"]),
            "random": self._written(points["random"]),
            "warnings": [*found.warnings, *best.warnings],
            "seconds": round(time.monotonic() - started, 1),
        }
        say(f"{tag}: layer {best.layer}, strength {strength:.3g}, {row['seconds']} s")
        return row

    def _extract(self, name: str, tag: str) -> ExtractionResult:
        known, options = self.concept.known, {"layers": self.sizes.layers, "tags": [tag], "replace_tags": True}
        if ("pairs",) in INPUTS[name]:
            stream = self.client.extract_vectors(known, name, pooling="mean", **options)
        else:
            texts = {self.concept.label: self.concept.texts(known)[self.concept.label]}
            stream = self.client.extract_vectors((), name, texts=texts, pooling="mean", **options)
        return stream.result(shows_progress)

    def _choose(self, tag: str, layer: int, evidence: Any) -> CalibrationResult:
        unit = evidence.activation_norm / evidence.norm
        choosing = self.concept.choosing
        return self.client.calibrate_vector(
            tag,
            choosing.prompts[: self.sizes.choosing],
            effect=effects.target_texts(choosing.positive),
            layers=[layer],
            strengths=[float(f"{change * unit:.3g}") for change in self.sizes.changes],
            random_vectors=1,
            max_tokens=self.sizes.choosing_tokens,
            max_perplexity_ratio=MOST_PERPLEXITY,
            max_repetition=MOST_REPETITION,
        ).result(shows_progress)

    def _points(self, tag: str, layer: int, strength: float) -> Mapping[str, DosePoint]:
        """By arm, on text after the held-out prompts. The instruction and no edit are the same for all vectors."""
        instruction = "" if "prompt" in self.baselines else self.concept.instruction
        result = self.client.calibrate_vector(
            tag,
            self.held_out.prompts,
            effect=effects.words(self.concept.words),
            layers=[layer],
            strengths=[strength],
            instruction=instruction,
            random_vectors=self.sizes.random_vectors,
            max_tokens=self.sizes.tokens,
        ).result(shows_progress)
        points = {point.arm: point for point in result.points}
        self.baselines |= {arm: points[arm] for arm in ("prompt", "unsteered") if arm in points}
        return points

    def _random(self, layer: int, length: float) -> list[float]:
        """The mean effect of random vectors so long, by prompt: vectors of several methods may be as long."""
        key = layer, round(length, 1)
        if key not in self.of_random:
            width = self.client.models()[0].d_model
            edits = random_edits(self.sizes.random_vectors, width, length, layer)
            each = [less(preferences(self.client, self.held_out, edit), self.plain) for edit in edits]
            self.of_random[key] = [sum(own) / len(own) for own in zip(*each, strict=True)]
        return self.of_random[key]

    def _written(self, point: DosePoint) -> Row:
        plain = self.baselines["unsteered"].perplexity.mean
        ratio = Interval(*(value / plain for value in vars(point.perplexity).values()))
        return {
            "words": rounded(point.effect),
            "perplexity_ratio": rounded(ratio),
            "repetition": rounded(point.repetition),
            "example": point.example,
        }

    def _detect(self, methods: dict[str, Row]) -> None:
        """All vectors of the concept in one pass over the texts."""
        by_layer: dict[int, list[Row]] = {}
        for row in methods.values():
            by_layer.setdefault(row["layer"], []).append(row)
        for layer, rows in by_layer.items():
            reports = self.client.detect_concept(
                [row["tag"] for row in rows],
                self.concept.detected,
                self.concept.label,
                layers=[layer],
                poolings=["mean"],
                calibration_fraction=0.2,
            ).result(shows_progress)
            by_tag = {report.detector: report for report in reports.detectors}
            for row in rows:
                report = by_tag[row["tag"]]
                assert report.auroc is not None
                row |= {"auroc": rounded(report.auroc), "random_auroc": round(report.random_auroc, 4)}


def _beyond_random(result: CalibrationResult) -> float:
    def at(arm: str) -> float:
        points = result.curve(arm, result.layer)
        return next((point.effect.mean for point in points if point.strength == result.strength), 0.0)

    return at("vector") - at("random")


def is_coherent(row: Row) -> bool:
    return bool(row["perplexity_ratio"]["mean"] <= MOST_PERPLEXITY and row["repetition"]["mean"] <= MOST_REPETITION)


def winner(row: Row, prompt: Row) -> str:
    """Returns "vector", "prompt", or "neither" where they are not told apart. `row`: of a vector."""
    beyond = row["beyond_prompt"]
    if beyond["high"] < 0 and is_coherent(prompt):
        return "prompt"
    return "vector" if beyond["low"] > 0 and row["is_safe"] and is_coherent(row) else "neither"


def best_of(concept: Row) -> tuple[str, Row]:
    """The method with the largest effect, among those whose text is coherent where there are any."""
    return max(concept["methods"].items(), key=lambda each: (is_coherent(each[1]), each[1]["effect"]["mean"]))


def shown(row: Row) -> str:
    effect, auroc = row["effect"], row["auroc"]
    return (
        f"effect {effect['mean']:+.2f} [{effect['low']:+.2f}, {effect['high']:+.2f}], perplexity times "
        f"{row['perplexity_ratio']['mean']:.2f}, AUROC {auroc['mean']:.2f}, words {row['words']['mean']:.2f}"
    )
