"""Activation patching: pairs of prompts that differ in what is sought, and the tokens that are patched together.

from patchclamp.patching import PatchPair

pair = PatchPair("The capital of France is", "The capital of Italy is", " Paris", " Rome")
grid = client.patch_activations([pair], positions={"country": 3, "last": -1}).result()
"""

from collections.abc import Mapping
from dataclasses import dataclass

from patchclamp.fields import build, build_as, shown
from patchclamp.prompts import PromptLike, prompt
from patchclamp.v1 import activation_pb2, program_pb2

PositionsLike = int | tuple[int, int | None]


@dataclass(frozen=True)
class PatchPair:
    """Holds two prompts, and what each is continued by: `answer` the clean one, `other_answer` the corrupt one.

    The metric "log_probability" needs no other answer, and "divergence" neither.
    """

    clean: PromptLike
    corrupt: PromptLike
    answer: str = ""
    other_answer: str = ""

    def message(self, parent: str = "") -> activation_pb2.PatchPair:
        """Returns the message. `parent` is the path of the pair in errors, with a dot after it."""
        return build_as(
            {name: parent + name for name in ("answer", "other_answer")},
            activation_pb2.PatchPair,
            clean=prompt(self.clean, field=f"{parent}clean"),
            corrupt=prompt(self.corrupt, field=f"{parent}corrupt"),
            answer=self.answer,
            other_answer=self.other_answer,
        )


def position_messages(positions: Mapping[str, PositionsLike]) -> list[activation_pb2.PatchPositions]:
    """Returns the columns {name: position} or {name: (start, end)}: half-open, and None is the end of the prompt.

    Raises TypeError for what is neither.
    """
    if not isinstance(positions, Mapping):
        raise TypeError(f"positions: expected {{name: position or (start, end)}}, got {shown(positions)}")
    messages = []
    for name, where in positions.items():
        end: int | None
        match where:
            case bool():
                raise TypeError(_expected(name, where))
            case int():
                start, end = where, where + 1
            case (int(), int() | None):
                start, end = where
            case _:
                raise TypeError(_expected(name, where))
        field = f"positions[{name!r}]"
        own = build_as({"start": field, "end": field}, program_pb2.PositionRange, start=start, end=end)
        messages.append(build(activation_pb2.PatchPositions, name=name, positions=own))
    return messages


def _expected(name: object, where: object) -> str:
    return f"positions[{name!r}]: expected an int, or (start, end), got {shown(where)}"
