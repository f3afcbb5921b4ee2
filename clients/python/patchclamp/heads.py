"""Attention heads: how they are named, needles to find them with, and grounding of an answer in its prompt.

from patchclamp.heads import Grounding, Needle, NeedleTest

client.detect_retrieval_heads(NeedleTest(lengths=[256, 512]), tags=["retrieval"]).result()
client.evaluate_head_edit("retrieval", "zero", top_k=3).result()
client.generate(document + question, grounding=Grounding("retrieval", top_k=10)).result().grounding

head.proto says what each field means; what is left out is the server's default.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from patchclamp.fields import build, build_as, instances, one_text_or_several, several, shown
from patchclamp.places import listed_places
from patchclamp.prompts import PromptLike, prompt
from patchclamp.v1 import generation_pb2, head_pb2


class Head(NamedTuple):
    """Names one attention head."""

    layer: int
    head: int

    def __str__(self) -> str:
        """Returns the head as people write it: L18H6."""
        return f"L{self.layer}H{self.head}"


# Text is a list such as "L18H6,L17H3", or else the id or tag of a head set.
HeadsLike = str | Iterable[tuple[int, int]]


@dataclass(frozen=True)
class Needle:
    """Holds a statement to hide, a question about it, and the words of the statement that answer it."""

    question: str
    needle: str
    answer: str

    def message(self) -> head_pb2.Needle:
        return build(head_pb2.Needle, question=self.question, needle=self.needle, answer=self.answer)


@dataclass(frozen=True)
class NeedleTest:
    """Hides every needle at every length and depth. Haystacks and needles are by default those of the server.

    lengths: tokens of the whole prompt. depths: where in the haystack the needle is, from 0 (start) to 1 (end).
    max_runs: how many runs of the seeded order are made; 0 is all.
    """

    haystacks: Sequence[str] = ()
    needles: Sequence[Needle] = ()
    lengths: Sequence[int] = ()
    depths: Sequence[float] = ()
    seed: int = 0
    max_runs: int = 0

    def message(self) -> head_pb2.NeedleTest:
        return build(
            head_pb2.NeedleTest,
            haystacks=one_text_or_several(self.haystacks),
            needles=[each.message() for each in instances(self.needles, Needle, "needles", "a Needle")],
            lengths=self.lengths,
            depths=self.depths,
            seed=self.seed,
            max_runs=self.max_runs,
        )


@dataclass(frozen=True)
class StoppingRule:
    """Stops when the top_k best heads agree with those of `window` successes earlier; 0 and None are the defaults."""

    top_k: int = 0
    agreement: float | None = None
    window: int = 0
    min_successes: int = 0

    def message(self) -> head_pb2.StoppingRule:
        return build(
            head_pb2.StoppingRule,
            top_k=self.top_k,
            agreement=self.agreement,
            window=self.window,
            min_successes=self.min_successes,
        )


@dataclass(frozen=True)
class TemporalFact:
    """Says that the prompt is continued by the answer.

    time_conditioned: whether the prompt names a time that the answer depends on.
    """

    prompt: str
    answer: str
    time_conditioned: bool

    def message(self) -> head_pb2.TemporalFact:
        return build(
            head_pb2.TemporalFact, prompt=self.prompt, answer=self.answer, time_conditioned=self.time_conditioned
        )


@dataclass(frozen=True)
class CleanCorruptPair:
    """Holds two prompts of the same number of tokens, and what each is continued by."""

    clean: PromptLike
    corrupt: PromptLike
    clean_answer: str
    corrupt_answer: str

    def message(self, parent: str = "") -> head_pb2.CleanCorruptPair:
        """Returns the message. `parent` is the path of the pair in errors, with a dot after it."""
        return build_as(
            {name: parent + name for name in ("clean_answer", "corrupt_answer")},
            head_pb2.CleanCorruptPair,
            clean=prompt(self.clean, field=f"{parent}clean"),
            corrupt=prompt(self.corrupt, field=f"{parent}corrupt"),
            clean_answer=self.clean_answer,
            corrupt_answer=self.corrupt_answer,
        )


@dataclass(frozen=True)
class Grounding:
    """Chooses the heads that say where an answer was copied from.

    head_set: id or tag. top_k: how many of its best heads; 0 is all that reach the threshold of the set.
    """

    head_set: str
    top_k: int = 0

    def message(self) -> generation_pb2.Grounding:
        return build(generation_pb2.Grounding, head_set=self.head_set, top_k=self.top_k)


GroundingLike = Grounding | generation_pb2.Grounding | str


def grounding_message(grounding: GroundingLike | None) -> generation_pb2.Grounding | None:
    """Returns the message of a grounding, or of the id or tag of a head set. Raises TypeError for anything else."""
    match grounding:
        case None | generation_pb2.Grounding():
            return grounding
        case str():
            return Grounding(grounding).message()
        case Grounding():
            return grounding.message()
        case _:
            raise TypeError(f"grounding: expected a Grounding, or the id or tag of a head set, got {shown(grounding)}")


def selection_message(heads: HeadsLike, top_k: int = 0) -> head_pb2.HeadSelection:
    """Returns a selection of listed (layer, head) pairs, or of a head set (id or tag), of which top_k keeps the best.
    Heads in text, such as "L18H6,L17H3", are listed ones.

    Raises ValueError for top_k with listed heads and for no heads, TypeError for what is neither.
    """
    if isinstance(heads, str) and (named := listed_places(heads, "H")) is not None:
        heads = named
    if isinstance(heads, str):
        return build(head_pb2.HeadSelection, head_set=heads, top_k=top_k)
    if top_k:
        raise ValueError("top_k selects from a head set; list only the heads that are meant")
    listed = [_head_id(each, f"heads[{i}]") for i, each in enumerate(several(heads, "heads", "(layer, head)"))]
    if not listed:
        raise ValueError("give at least one head")
    return head_pb2.HeadSelection(heads=head_pb2.HeadIds(heads=listed))


def _head_id(head: object, field: str) -> head_pb2.HeadId:
    pair = several(head, field, "an int")
    if len(pair) != 2:
        raise ValueError(f"{field}: expected (layer, head), got {shown(head)}")
    return build_as({"layer": f"{field}[0]", "head": f"{field}[1]"}, head_pb2.HeadId, layer=pair[0], head=pair[1])
