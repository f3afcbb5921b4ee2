"""Concepts of benchmarks/data/concepts: pairs that vectors are made of, and what has no part in making them.

Of the pairs of a concept the last quarter is kept for detection. Strengths are chosen with the prompts and texts of
`<concept>.measure.json`, and what comes of them is measured with those of `<concept>.held_out.json`.
"""

import json
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

DATA = Path(__file__).parents[1] / "data" / "concepts"
# The first two were there before this table, and say what the data sets of the client say too.
NAMES = ("joyful_sad", "formal_casual", "winter_summer", "hesitant_certain")
KEPT = 0.25
Pair = tuple[str, str]


@dataclass(frozen=True)
class Prompts:
    """`positive`, `negative`: continuations of each of the prompts."""

    prompts: tuple[str, ...]
    positive: tuple[str, ...]
    negative: tuple[str, ...]


@dataclass(frozen=True)
class Concept:
    """`instruction`: what a user could write instead. `question`: what a user could ask about a text."""

    name: str
    pairs: tuple[Pair, ...]
    words: tuple[str, ...]
    choosing: Prompts
    held_out: Prompts
    instruction: str
    question: str

    @property
    def label(self) -> str:
        """The side that texts are steered to: "joyful" of joyful_sad."""
        return self.name.split("_")[0]

    @cached_property
    def known(self) -> tuple[Pair, ...]:
        """The pairs that vectors are made of."""
        return self.pairs[: len(self.pairs) - round(KEPT * len(self.pairs))]

    def texts(self, pairs: tuple[Pair, ...]) -> dict[str, list[str]]:
        """By label, the positive one first."""
        positive, negative = self.name.split("_")
        return {positive: [own for own, _ in pairs], negative: [own for _, own in pairs]}

    @property
    def detected(self) -> dict[str, list[str]]:
        """Texts that no vector is made of."""
        return self.texts(self.pairs[len(self.known) :])


def load(name: str, directory: Path = DATA) -> Concept:
    lines = (directory / f"{name}.jsonl").read_text(encoding="utf-8").splitlines()
    pairs = tuple((each["positive"], each["negative"]) for each in map(json.loads, lines))
    measure, held_out = (
        json.loads((directory / f"{name}.{part}.json").read_text(encoding="utf-8")) for part in ("measure", "held_out")
    )
    return Concept(
        name,
        pairs,
        tuple(measure["positive_words"]),
        _prompts(measure),
        _prompts(held_out),
        held_out["instruction"],
        held_out["question"],
    )


def _prompts(stored: dict[str, Any]) -> Prompts:
    return Prompts(*(tuple(stored[name]) for name in ("prompts", "positive", "negative")))
