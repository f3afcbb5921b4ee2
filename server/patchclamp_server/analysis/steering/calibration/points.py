"""Points of a dose-response curve: what came of all prompts at one layer and strength, with intervals over prompts.

A point of random vectors takes those of all of them together. Perplexity is exp(Σ NLL / Σ tokens); the others are means
over texts, those by token weighed by their tokens.
"""

from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from dataclasses import dataclass
from enum import Enum

import torch
from torch import Tensor

from patchclamp_server.analysis.neurons.intervals import Interval, Items, interval_of
from patchclamp_server.analysis.steering.calibration.coherence import expectation_adjusted_distinct, repetition
from patchclamp_server.analysis.steering.calibration.effects import (
    Effect,
    ReadEffect,
    TargetsEffect,
    Weighed,
)
from patchclamp_server.analysis.steering.calibration.texts import Ids, Writing, Written, written
from patchclamp_server.engine.engine import Engine
from patchclamp_server.interventions.bound import BoundProgram

EXAMPLE_CHARACTERS = 1000
# Where the unsteered model all but rules a text out; a double has no more.
MOST = 1e300


class Arm(Enum):
    """The names of the enum CalibrationArm, in lower case and without its prefix."""

    VECTOR = "vector"
    RANDOM = "random"
    PROMPT = "prompt"
    UNSTEERED = "unsteered"


@dataclass(frozen=True, eq=False)
class Cell:
    """All prompts under each of the programs: one, or one for each random vector."""

    arm: Arm
    programs: tuple[BoundProgram | None, ...]
    layer: int = 0
    strength: float = 0.0


@dataclass(frozen=True)
class CalibrationPrompt:
    """`instructed`: with the instruction before it, where there is one."""

    plain: Ids
    instructed: Ids | None = None


@dataclass(frozen=True)
class DosePoint:
    arm: Arm
    layer: int
    strength: float
    effect: Interval
    perplexity: Interval
    repetition: Interval
    distinct: Interval
    divergence: Interval
    example: str


@dataclass(frozen=True, eq=False)
class Measurement:
    """How all cells are measured alike."""

    engine: Engine
    prompts: tuple[CalibrationPrompt, ...]
    max_tokens: int
    effect: Effect
    seed: int

    def requests(self, cells: Sequence[Cell]) -> int:
        writings = [each for cell in cells for each in self._writings(cell)]
        targets = self.effect.requests(writings) if isinstance(self.effect, TargetsEffect) else 0
        return sum(each.requests for each in writings) + targets

    async def points(self, cells: Sequence[Cell]) -> AsyncGenerator[int | list[DosePoint], None]:
        """Yields 1 for each request that has ended, then the point of each cell."""
        writings = [each for cell in cells for each in self._writings(cell)]
        texts: list[Written] = []
        effects: list[Weighed] = []
        reader = self.effect.program if isinstance(self.effect, ReadEffect) else None
        async with aclosing(written(self.engine, writings, self.max_tokens, reader)) as events:
            async for event in events:
                if isinstance(event, int):
                    yield event
                else:
                    texts = event
        if isinstance(self.effect, TargetsEffect):
            async with aclosing(self.effect.measure(self.engine, writings)) as measured:
                async for each in measured:
                    if isinstance(each, int):
                        yield each
                    else:
                        effects = each
        else:
            effects = list(map(self.effect.of, texts))
        found, at = [], 0
        for cell in cells:
            n = len(cell.programs) * len(self.prompts)
            found.append(self._point(cell, texts[at : at + n], effects[at : at + n]))
            at += n
        yield found

    def _writings(self, cell: Cell) -> list[Writing]:
        instructed = cell.arm is Arm.PROMPT
        return [
            Writing(prompt.instructed if instructed and prompt.instructed else prompt.plain, prompt.plain, program)
            for program in cell.programs
            for prompt in self.prompts
        ]

    def _point(self, cell: Cell, texts: Sequence[Written], effects: Sequence[Weighed]) -> DosePoint:
        vocab = self.engine.model.info.vocab_size
        return DosePoint(
            cell.arm,
            cell.layer,
            cell.strength,
            effect=self._interval(effects),
            perplexity=self._interval([(text.nll, float(len(text.ids))) for text in texts], exponential=True),
            repetition=self._interval([(repetition(text.ids), 1.0) for text in texts]),
            distinct=self._interval([(expectation_adjusted_distinct(text.ids, vocab), 1.0) for text in texts]),
            divergence=self._interval([(text.divergence, float(len(text.ids))) for text in texts]),
            example=texts[0].text[:EXAMPLE_CHARACTERS],
        )

    def _interval(self, values: Sequence[Weighed], *, exponential: bool = False) -> Interval:
        """values: of each prompt under the first program, then under the next."""
        table = torch.tensor(values, dtype=torch.float64).view(-1, len(self.prompts), 2).sum(0)
        if not bool(table[:, 1].sum() > 0):
            return Interval(0.0, 0.0, 0.0)
        return interval_of(Items(table[:, 0], table[:, 1]), _exp if exponential else _same, self.seed)


def _exp(x: Tensor) -> Tensor:
    return x.exp().clamp_max(MOST)


def _same(x: Tensor) -> Tensor:
    return x
