"""Methods by concepts: a vector is found, its strength chosen, and measured on what has not been seen by either.

    found      by ExtractVectors, from the pairs of a concept that are not kept for detection
    chosen     by CalibrateVector, by the log-probability of texts after prompts of its own: layer and strength (the
               knee)
    effect     effects.py, on held-out prompts and texts, at that strength; beside random vectors as long, and an
               instruction; and at the largest strength that the choice found safe
    coherence  by CalibrateVector at that strength alone, on text written after the held-out prompts: perplexity of the
               unsteered model over that of its own text, repetition, and the share of texts that have one of the words
               of the concept; beside both
    AUROC      by DetectConcept, of the mean projection (ReFT-r1: of the largest) on texts that no vector was made of;
               beside the model asked

Strengths are tried as shares of the norm of the activations, so that they mean the same for a vector of any length.
Prompting wins where its effect is larger (the interval of the difference, prompt by prompt, lies on its side of 0) and
its text is as coherent as is demanded of a vector; a vector wins likewise. A vector that was safe at no strength does
not win. The knee may lie far below the end of the safe range, so the difference there is kept too.
"""

import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from neurons.shown import say, shows_progress

from patchclamp import Client, effects
from patchclamp.names import METHODS
from patchclamp.programs import add
from patchclamp.results import CalibrationResult, DosePoint, ExtractionResult
from patchclamp_server.analysis.steering.registry import INPUTS
from vectors.concepts import NAMES, Concept, load
from vectors.effects import Row, asked, chat, interval, less, preferences, random_edits, rounded, written

# Of the server, in its order: those that find a vector from two sides of texts.
EXTRACTORS = tuple(name for name, inputs in INPUTS.items() if name in METHODS and {("pairs",), ("texts",)} & {*inputs})
# What a method is given besides examples and layers. So many steps take half a minute; other methods take seconds.
OPTIONS: dict[str, Row] = {"reft_r1": {"max_steps": 24, "batch_size": 8}}
POOLED: Row = {"pooling": "mean"}
# How projections of a text are pooled, where it is not by their mean: as they were in the training.
DETECTS = {"reft_r1": "max"}
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
    changes: tuple[float, ...] = (0.15, 0.3, 0.45)
    choosing: int = 5
    choosing_tokens: int = 10
    prompts: int = 12
    tokens: int = 16
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
        told, untold = (preferences(client, self.held_out, chat(each)) for each in (concept.instruction, ""))
        self.prompted = less(told, untold)
        self.of_random: dict[tuple[int, float], list[float]] = {}
        self.unsteered: DosePoint | None = None

    def rows(self) -> Row:
        methods = {name: self._method(name) for name in self.sizes.methods}
        assert self.unsteered is not None
        self._detect(methods)
        instructed = {
            "instruction": self.concept.instruction,
            "effect": interval(self.prompted),
            **self._instructed(),
            "auroc": asked(self.client, self.concept),
        }
        for name, row in methods.items():
            row["winner"] = winner(row, instructed)
            say(f"{self.concept.name}, {name}: {shown(row)}; wins: {row['winner']}")
        say(f"{self.concept.name}, instruction: {shown(instructed)}")
        return {
            "pairs": len(self.concept.known),
            "detected_texts": sum(map(len, self.concept.detected.values())),
            "unsteered": self._written(self.unsteered),
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
        most = next(each.high for each in best.safe if each.layer == best.layer) if is_safe else strength
        by_vector = self._effects(tag, best.layer, strength)
        by_most = by_vector if most == strength else self._effects(tag, best.layer, most)
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
            "most_change": round(most * own.norm / own.activation_norm, 3),
            "most_effect": interval(by_most),
            "most_beyond_prompt": interval(less(by_most, self.prompted)),
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
        known, options = self.concept.known, OPTIONS.get(name, POOLED)
        given = {"layers": self.sizes.layers, "tags": [tag], "replace_tags": True, **options}
        if ("pairs",) in INPUTS[name]:
            return self.client.extract_vectors(known, name, **given).result(shows_progress)
        texts = {self.concept.label: self.concept.texts(known)[self.concept.label]}
        return self.client.extract_vectors((), name, texts=texts, **given).result(shows_progress)

    def _choose(self, tag: str, layer: int, evidence: Any) -> CalibrationResult:
        unit = evidence.activation_norm / evidence.norm
        choosing = self.concept.choosing
        return self.client.calibrate_vector(
            tag,
            choosing.prompts[: self.sizes.choosing],
            effect=effects.target_texts(choosing.positive[:2]),
            layers=[layer],
            strengths=[float(f"{change * unit:.3g}") for change in self.sizes.changes],
            random_vectors=1,
            max_tokens=self.sizes.choosing_tokens,
            max_perplexity_ratio=MOST_PERPLEXITY,
            max_repetition=MOST_REPETITION,
        ).result(shows_progress)

    def _points(self, tag: str, layer: int, strength: float) -> Mapping[str, DosePoint]:
        """By arm, on text after the held-out prompts. That of no edit is the same for all vectors."""
        result = self.client.calibrate_vector(
            tag,
            self.held_out.prompts,
            effect=effects.words(self.concept.words),
            layers=[layer],
            strengths=[strength],
            random_vectors=1,
            max_tokens=self.sizes.tokens,
        ).result(shows_progress)
        points = {point.arm: point for point in result.points}
        self.unsteered = points["unsteered"]
        return points

    def _effects(self, tag: str, layer: int, strength: float) -> list[float]:
        """By prompt."""
        edit = add(tag, layers=layer, strength=strength)
        return less(preferences(self.client, self.held_out, program=edit), self.plain)

    def _random(self, layer: int, length: float) -> list[float]:
        """The mean effect of random vectors so long, by prompt: vectors of several methods may be as long."""
        key = layer, round(length, 1)
        if key not in self.of_random:
            width = self.client.models()[0].d_model
            edits = random_edits(self.sizes.random_vectors, width, length, layer)
            each = [less(preferences(self.client, self.held_out, program=edit), self.plain) for edit in edits]
            self.of_random[key] = [sum(own) / len(own) for own in zip(*each, strict=True)]
        return self.of_random[key]

    @property
    def _perplexity(self) -> float:
        """Of the unsteered model on its own text."""
        assert self.unsteered is not None
        return self.unsteered.perplexity.mean

    def _written(self, point: DosePoint) -> Row:
        return {
            "words": rounded(point.effect),
            "perplexity_ratio": rounded(point.perplexity, self._perplexity),
            "repetition": rounded(point.repetition),
            "example": point.example,
        }

    def _instructed(self) -> Row:
        row = written(self.client, self.concept, self.held_out.prompts, self.sizes.tokens)
        perplexity = row.pop("perplexity")
        return row | {"perplexity_ratio": {name: round(x / self._perplexity, 4) for name, x in perplexity.items()}}

    def _detect(self, methods: dict[str, Row]) -> None:
        """All vectors of the concept in one pass over the texts."""
        for layer in {row["layer"] for row in methods.values()}:
            rows = {name: row for name, row in methods.items() if row["layer"] == layer}
            pooled = {row["tag"]: DETECTS.get(name, "mean") for name, row in rows.items()}
            reports = self.client.detect_concept(
                list(pooled),
                self.concept.detected,
                self.concept.label,
                layers=[layer],
                poolings=sorted(set(pooled.values())),
                calibration_fraction=0.2,
            ).result(shows_progress)
            found = {(each.detector, each.pooling): each for each in reports.detectors}
            for row in rows.values():
                report = found[row["tag"], pooled[row["tag"]]]
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
