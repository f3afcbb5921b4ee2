"""Confidence in an answer, from what the layers before the last would have said.

from patchclamp.confidence import Confidence

client.generate(question, confidence=True).result().confidence.consistency
client.score(question, " yes", confidence=Confidence(options=[" yes", " no"])).confidence.options[0].probability

generation.proto says what each field means; what is left out is the server's default.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from patchclamp.fields import build, one_or_several, shown
from patchclamp.v1 import generation_pb2


@dataclass(frozen=True)
class Confidence:
    """Chooses what is read of an answer.

    layers: default is every layer. options: texts that the answer may begin with, two at least; then its first token
    alone is read. thresholds: of two options, the probability of the first above which each layer says it.
    """

    layers: int | Sequence[int] = ()
    options: Sequence[str] = ()
    thresholds: Sequence[float] = ()

    def message(self) -> generation_pb2.Confidence:
        return build(
            generation_pb2.Confidence,
            layers=one_or_several(self.layers, "layers", "an int"),
            options=self.options,
            thresholds=self.thresholds,
        )


ConfidenceLike = Confidence | generation_pb2.Confidence | bool


def confidence_message(confidence: ConfidenceLike | None) -> generation_pb2.Confidence | None:
    """Returns the message; True is the default of everything, None and False nothing. Raises TypeError otherwise."""
    match confidence:
        case None | False:
            return None
        case True:
            return generation_pb2.Confidence()
        case generation_pb2.Confidence():
            return confidence
        case Confidence():
            return confidence.message()
        case _:
            raise TypeError(f"confidence: expected a Confidence, or True, got {shown(confidence)}")
