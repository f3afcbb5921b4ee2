"""Grounding tells from which prompt tokens a generated token was copied, by retrieval heads as it is generated.

    source of token t at position p + 1:  (h, j) with j = argmax_i a_h(p, i), j in the prompt, and token j is t
    grounded ratio = |{generated tokens that have a source}| / |{generated tokens}|

a_h(p, i) is the attention probability of head h from position p to i, over the heads of a set. A hit is that of a
needle run (analysis/heads/retrieval/retrieval_scores.py; Wu et al. 2024) with the whole prompt as the needle; this is
ours, METHODS.md H2. It needs one more readout of these heads in the program of the request, and no attention matrix.
"""

from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace

from patchclamp_server.artifacts.head_sets import Head
from patchclamp_server.interventions.bound import BoundProgram, BoundReadout
from patchclamp_server.interventions.program import GENERATING, HeadReadout, ReadoutValue
from patchclamp_server.model.sites import Site


@dataclass(frozen=True)
class CopySource:
    """The fields are as in the message of this name."""

    position: int
    layer: int
    head: int
    probability: float


@dataclass(frozen=True)
class GroundedRange:
    """Prompt positions start ≤ p < end, from which `tokens` tokens were copied."""

    start: int
    end: int
    tokens: int
    text: str


@dataclass(frozen=True)
class GroundingReport:
    """Ranges are in order and never adjacent. Each token counts where its most probable source is, so that the tokens
    of all ranges add up to `grounded_tokens`."""

    grounded_ratio: float
    grounded_tokens: int
    ranges: tuple[GroundedRange, ...]


@dataclass(frozen=True, eq=False)
class Grounding:
    """Reads the chosen heads as one more readout of a program, under a name that none of its own has."""

    readout: BoundReadout

    @classmethod
    def by(cls, heads: Iterable[Head], program: BoundProgram) -> "Grounding":
        by_layer: dict[int, list[int]] = defaultdict(list)
        for layer, head in sorted(heads):
            by_layer[layer].append(head)
        name = "grounding"
        while any(readout.name == name for readout in program.readouts):
            name += "'"
        asked = {layer: tuple(of_layer) for layer, of_layer in by_layer.items()}
        return cls(BoundReadout(name, HeadReadout, Site.ATTN_Z, tuple(asked), GENERATING, {}, (), 0, asked))

    def added_to(self, program: BoundProgram) -> BoundProgram:
        """Returns the program as its receipt knows it, with the readout added."""
        return replace(program, readouts=(*program.readouts, self.readout))


class GroundedTokens:
    """Follows the events of one grounded request in order: a row is read before the token that it generates."""

    def __init__(self, grounding: Grounding, prompt: Sequence[int], text_of: Callable[[Sequence[int]], str]) -> None:
        self._readout = grounding.readout
        self._prompt = prompt
        self._text_of = text_of
        # These are the values read at rows whose token is still to come, by position.
        self._read: dict[int, list[ReadoutValue]] = {}
        self._tokens = 0
        self._copied: Counter[int] = Counter()

    def take(self, values: Iterable[ReadoutValue]) -> list[ReadoutValue]:
        """Keeps the values of the grounding, and returns those of other readouts."""
        others = []
        for value in values:
            if value.name == self._readout.name:
                self._read.setdefault(value.position, []).append(value)
            else:
                others.append(value)
        return others

    def sources(self, position: int, token: int) -> list[CopySource]:
        """Returns where the generated `token` at `position` was copied from, the most probable source first."""
        found = [
            CopySource(at, value.layer, head, probability)
            for value in self._read.pop(position - 1, ())
            for head, at, probability in zip(self._readout.heads[value.layer], value.ids, value.values, strict=True)
            if at < len(self._prompt) and self._prompt[at] == token
        ]
        found.sort(key=lambda source: (-source.probability, source.layer, source.head))
        self._tokens += 1
        if found:
            self._copied[found[0].position] += 1
        return found

    def report(self) -> GroundingReport:
        """Returns the report on the tokens so far. Where nothing is generated, nothing is grounded."""
        grounded = self._copied.total()
        return GroundingReport(grounded / self._tokens if self._tokens else 0.0, grounded, tuple(self._ranges()))

    def _ranges(self) -> Iterator[GroundedRange]:
        spans: list[tuple[int, int, int]] = []
        for position, tokens in sorted(self._copied.items()):
            if spans and spans[-1][1] == position:
                start, _, before = spans.pop()
                spans.append((start, position + 1, before + tokens))
            else:
                spans.append((position, position + 1, tokens))
        for start, end, tokens in spans:
            yield GroundedRange(start, end, tokens, self._text_of(self._prompt[start:end]))
