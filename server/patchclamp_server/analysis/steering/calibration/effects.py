"""How much of a concept there is, in each text that was written or in what the model would say.

    projection     mean of h · v / |v| in the unsteered model over the tokens of the text but the last, which is not run
    probe          mean probability that a probe gives its target there, of a ridge probe its number
    words          whether the text has any of the words
    classifier     p(target | text) of a bag of words
    target_texts   log p a token of given texts as continuations of the prompt, under the edit

An effect is a value x and a weight w by text; the mean over texts is Σ x / Σ w.
"""

from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar, TypeAlias

from patchclamp_server.analysis.requests import completed, score_request
from patchclamp_server.analysis.steering.calibration.texts import Ids, Writing, Written
from patchclamp_server.analysis.steering.calibration.word_classifier import WordClassifier
from patchclamp_server.artifacts.types import Artifact
from patchclamp_server.engine.engine import Engine
from patchclamp_server.engine.request import Token
from patchclamp_server.interventions.bind import bind
from patchclamp_server.interventions.bound import BoundProgram
from patchclamp_server.interventions.program import (
    Phase,
    ProbeReadout,
    Program,
    ProjectionReadout,
    Readout,
    Scope,
    TokenSelector,
    Vector,
)
from patchclamp_server.interventions.resolver import ArtifactLookup
from patchclamp_server.model.info import ModelInfo

Weighed: TypeAlias = tuple[float, float]
_GENERATED = Scope((TokenSelector(phase=Phase.GENERATED),))


@dataclass(frozen=True, eq=False)
class ProjectionEffect:
    """`program` has one readout, the projection on the vector at `layer`, over generated tokens."""

    program: BoundProgram
    layer: int
    name: ClassVar[str] = "projection"

    @classmethod
    def on(cls, vector: Artifact, info: ModelInfo) -> "ProjectionEffect":
        """Returns that on a vector at the layer of its best evidence, or without any at its last layer."""
        best = vector.info.evidence.get("best_layer")
        layer = best if isinstance(best, int) and best in vector.info.layers else vector.info.layers[-1]
        site = vector.info.site
        assert site is not None
        kind = ProjectionReadout((Vector(values=vector.direction(layer)),))
        return cls(bind(Program(readouts=(Readout(kind, site, layers=(layer,), scope=_GENERATED),)), info), layer)

    def of(self, text: Written) -> Weighed:
        return sum(text.readings), float(len(text.readings))

    def card(self) -> dict[str, Any]:
        return {"layer": self.layer}


@dataclass(frozen=True, eq=False)
class ProbeEffect:
    """`program` has one readout, the probe over generated tokens. `probe`: its id."""

    program: BoundProgram
    probe: str
    name: ClassVar[str] = "probe"

    @classmethod
    def of_probe(cls, artifact_id: str, info: ModelInfo, artifacts: ArtifactLookup) -> "ProbeEffect":
        """Returns that of a probe of the served model."""
        readout = Readout(ProbeReadout(artifact_id), None, scope=_GENERATED)
        return cls(bind(Program(readouts=(readout,)), info, artifacts), artifact_id)

    def of(self, text: Written) -> Weighed:
        return sum(text.readings), float(len(text.readings))

    def card(self) -> dict[str, Any]:
        return {"probe": self.probe}


@dataclass(frozen=True)
class WordsEffect:
    words: tuple[str, ...]
    name: ClassVar[str] = "words"

    def of(self, text: Written) -> Weighed:
        said = text.text.casefold()
        return float(any(word.casefold() in said for word in self.words)), 1.0

    def card(self) -> dict[str, Any]:
        return {"words": list(self.words)}


@dataclass(frozen=True, eq=False)
class ClassifierEffect:
    classifier: WordClassifier
    target: str
    name: ClassVar[str] = "classifier"

    def of(self, text: Written) -> Weighed:
        return self.classifier.probability(text.text), 1.0

    def card(self) -> dict[str, Any]:
        return {"target": self.target, "heldout_accuracy": self.classifier.heldout_accuracy}


@dataclass(frozen=True)
class TargetsEffect:
    """`continuations`: the texts as tokens, by the prompt that they continue."""

    continuations: dict[Ids, tuple[Ids, ...]]
    name: ClassVar[str] = "target_texts"

    def requests(self, writings: Sequence[Writing]) -> int:
        return sum(len(self.continuations[each.prompt]) for each in writings)

    def card(self) -> dict[str, Any]:
        return {"texts": len(next(iter(self.continuations.values())))}

    async def measure(self, engine: Engine, writings: Sequence[Writing]) -> AsyncGenerator[int | list[Weighed], None]:
        """Yields 1 for each request that has ended, then the effects."""
        makes = [
            partial(score_request, each.prompt, ids, each.program)
            for each in writings
            for ids in self.continuations[each.prompt]
        ]
        sums: list[Weighed] = []
        async with aclosing(completed(engine, makes)) as finished:
            async for events in finished:
                scores = [event.logprob or 0.0 for event in events if isinstance(event, Token)]
                sums.append((sum(scores), float(len(scores))))
                yield 1
        found, at = [], 0
        for each in writings:
            own = sums[at : at + len(self.continuations[each.prompt])]
            found.append((sum(x for x, _ in own), sum(w for _, w in own)))
            at += len(own)
        yield found


ReadEffect: TypeAlias = ProjectionEffect | ProbeEffect
TextEffect: TypeAlias = ReadEffect | WordsEffect | ClassifierEffect
Effect: TypeAlias = TextEffect | TargetsEffect
