"""How well words describe a neuron, by the model itself.

    pmi        (log p(d | contexts) - log p(d | no context)) / tokens of d
    causal     mean over NEUTRAL prompts of (log p(d | prompt; a ← max) - log p(d | prompt)) / tokens of d
    z          (causal - mean of r) / deviation of r        r: the causal scores of random neurons of the same layer

in nats a token, for the words d of a description after a space. a ← max: the neuron is clamped, at every token, to the
largest value that it was seen with; a random neuron to its own. The deviation is that of a sample (n - 1).

The prompt of pmi is, with each context on a line of its own and its largest token in brackets,

    In each line, one word is in [brackets].
    - The man walked the [dog] in the park
    - ...
    What the words in [brackets] have in common:

and without a context the same with no line. White space in a context counts as one space. Lines are tokenised by
themselves; those of the largest values come first, as many as the model's context length has room for.

Source: Hernandez et al. 2022, Natural language descriptions of deep visual features, section 3 (pointwise mutual
information of description and exemplars); there a captioner sees exemplars, here the model reads them.
"""

from collections.abc import AsyncGenerator, Mapping, Sequence
from contextlib import aclosing
from dataclasses import dataclass
from functools import partial
from statistics import fmean, stdev

from patchclamp_server.analysis.neurons.contexts import NeuronContext
from patchclamp_server.analysis.requests import Make, completed, score_request
from patchclamp_server.artifacts.neuron_sets import Neuron
from patchclamp_server.engine.engine import Engine
from patchclamp_server.engine.request import Token
from patchclamp_server.errors import InvalidArgument
from patchclamp_server.interventions.bind import bind
from patchclamp_server.interventions.bound import BoundProgram
from patchclamp_server.interventions.program import Edit, NeuronEdit, Program
from patchclamp_server.model.info import ModelInfo
from patchclamp_server.model.sites import Site
from patchclamp_server.text.prompt import PromptEncoder

INTRODUCTION = "In each line, one word is in [brackets].\n"
QUESTION = "What the words in [brackets] have in common:"
NEUTRAL = ("This is about", "I was thinking of", "The next thing is")


@dataclass(frozen=True)
class Description:
    """Its text, and the tokens that this has after a space."""

    text: str
    ids: tuple[int, ...]


@dataclass(frozen=True)
class DescriptionScore:
    """`causal_z` is None where the random neurons do not differ."""

    description: str
    pmi: float
    causal: float | None = None
    causal_z: float | None = None


@dataclass(frozen=True, eq=False)
class Described:
    """A neuron, its contexts, and its largest value where the causal score is asked for."""

    neuron: Neuron
    contexts: tuple[NeuronContext, ...]
    largest: float | None = None


class DescriptionScorer:
    """Scores the same descriptions of many neurons. It tokenises: make it in a thread."""

    def __init__(self, prompts: PromptEncoder, info: ModelInfo, descriptions: Sequence[Description]) -> None:
        """Raises InvalidArgument on "descriptions[i]" for one that has no room behind the question."""
        self._prompts, self._info, self._descriptions = prompts, info, tuple(descriptions)
        start = prompts.text_start
        self._opening = (*start, *prompts.encode_body(INTRODUCTION, "", most_tokens=info.context_length))
        self._question = prompts.encode_continuation(QUESTION, "")
        self._neutral = [(*start, *prompts.encode_body(text, "", most_tokens=info.context_length)) for text in NEUTRAL]
        self._longest = max(len(each.ids) for each in descriptions)
        room = info.context_length - len(self._opening) - len(self._question)
        for i, description in enumerate(self._descriptions):
            if len(description.ids) > room:
                message = f"has {len(description.ids)} tokens; expected at most {room}"
                raise InvalidArgument(f"descriptions[{i}]", message)

    def requests(self, neurons: int, random: int, causal: bool) -> int:
        """Returns how many requests so many neurons are, with so many random ones in all."""
        prompts = neurons + 1 + (len(NEUTRAL) * (neurons + random + 1) if causal else 0)
        return prompts * len(self._descriptions)

    def prompt(self, contexts: Sequence[NeuronContext]) -> tuple[int, ...]:
        """Returns the tokens before a description. InvalidArgument on "context_tokens" where not one line has room."""
        lines: list[int] = []
        room = self._info.context_length - len(self._opening) - len(self._question) - self._longest
        for i, context in enumerate(contexts):
            line = self._prompts.encode_continuation(f"- {bracketed(context, self._prompts)}\n", "context_tokens")
            if len(lines) + len(line) > room:
                if not i:
                    message = f"one context is a line of {len(line)} tokens, for which the model has room of {room}"
                    raise InvalidArgument("context_tokens", message)
                break
            lines += line
        return (*self._opening, *lines, *self._question)

    async def scores(
        self, engine: Engine, neurons: Sequence[Described], random: Mapping[int, Mapping[Neuron, float]], site: Site
    ) -> AsyncGenerator[int | tuple[DescriptionScore, ...], None]:
        """Yields the number of requests that have ended, each time some have, and the scores of each neuron in order.

        `random`: for each layer random neurons with their largest values; nothing where no causal score is asked.
        """
        causal = bool(random)
        # Log-probabilities by prompt and description; those that all neurons are compared with come first.
        rows: list[list[float]] = []
        n_neutral = len(self._neutral) if causal else 0
        head = 1 + n_neutral * (1 + sum(map(len, random.values())))
        own = 1 + n_neutral
        compared: _Compared | None = None
        async with aclosing(self._logprobs(engine, self._asked(neurons, random, site))) as measured:
            async for row in measured:
                rows.append(row)
                yield len(row)
                if len(rows) == head:
                    compared = _Compared(rows, n_neutral, {layer: len(of) for layer, of in random.items()})
                elif compared is not None and (len(rows) - head) % own == 0:
                    described = neurons[(len(rows) - head) // own - 1]
                    yield compared.scores(self._descriptions, described.neuron.layer, rows[-own:])

    async def _asked(
        self, neurons: Sequence[Described], random: Mapping[int, Mapping[Neuron, float]], site: Site
    ) -> AsyncGenerator[tuple[tuple[int, ...], BoundProgram | None], None]:
        """Yields every prompt with its program: without a context; the neutral ones unedited, and with each random
        neuron; then of each neuron with its contexts, and the neutral ones with it."""
        yield self.prompt(()), None
        neutral = self._neutral if random else []
        for prompt in neutral:
            yield prompt, None
        for clamped in random.values():
            for neuron, value in clamped.items():
                program = _clamp(neuron, value, site, self._info)
                for prompt in neutral:
                    yield prompt, program
        for described in neurons:
            yield await self._prompts.analysis.run(self.prompt, described.contexts), None
            if described.largest is not None:
                program = _clamp(described.neuron, described.largest, site, self._info)
                for prompt in neutral:
                    yield prompt, program

    async def _logprobs(
        self, engine: Engine, asked: AsyncGenerator[tuple[tuple[int, ...], BoundProgram | None], None]
    ) -> AsyncGenerator[list[float], None]:
        """Yields for every prompt the mean log-probability of the tokens of each description."""

        async def requests() -> AsyncGenerator[Make, None]:
            async with aclosing(asked) as each:
                async for prompt, program in each:
                    for description in self._descriptions:
                        yield partial(score_request, prompt, description.ids, program)

        row: list[float] = []
        async with aclosing(completed(engine, requests(), patient=True)) as finished:
            async for events in finished:
                row.append(fmean(event.logprob or 0.0 for event in events if isinstance(event, Token)))
                if len(row) == len(self._descriptions):
                    yield row
                    row = []


class _Compared:
    """What all neurons are compared with: the rows without a context, of the unedited model after neutral prompts, and
    after them with each random neuron of each layer."""

    def __init__(self, rows: Sequence[Sequence[float]], n_neutral: int, random: Mapping[int, int]) -> None:
        self._without, self._unedited = rows[0], rows[1 : 1 + n_neutral]
        # By layer, of each description the causal scores of the random neurons.
        self._random: dict[int, list[list[float]]] = {}
        at = 1 + n_neutral
        for layer, n in random.items():
            changes = [self._change(rows[at + i * n_neutral : at + (i + 1) * n_neutral]) for i in range(n)]
            self._random[layer] = [list(of) for of in zip(*changes, strict=True)]
            at += n * n_neutral

    def scores(
        self, descriptions: Sequence[Description], layer: int, rows: Sequence[Sequence[float]]
    ) -> tuple[DescriptionScore, ...]:
        """Of a neuron, of whose rows the first is with its contexts, and the others are after neutral prompts."""
        pmi = [given - without for given, without in zip(rows[0], self._without, strict=True)]
        if not self._unedited:
            return tuple(DescriptionScore(d.text, score) for d, score in zip(descriptions, pmi, strict=True))
        each = zip(descriptions, pmi, self._change(rows[1:]), self._random[layer], strict=True)
        return tuple(
            DescriptionScore(description.text, score, causal, z_among(causal, random))
            for description, score, causal, random in each
        )

    def _change(self, edited: Sequence[Sequence[float]]) -> list[float]:
        """Returns of each description the mean change over the neutral prompts."""
        changes = [
            [a - b for a, b in zip(row, unedited, strict=True)]
            for row, unedited in zip(edited, self._unedited, strict=True)
        ]
        return [fmean(of) for of in zip(*changes, strict=True)]


def z_among(value: float, random: Sequence[float]) -> float | None:
    """Returns z, or None where the random scores do not differ."""
    deviation = stdev(random)
    return (value - fmean(random)) / deviation if deviation > 0 else None


def bracketed(context: NeuronContext, prompts: PromptEncoder) -> str:
    """Returns the text of a context with its largest token in brackets, on one line."""
    before, at, after = (
        prompts.text_of(part)
        for part in (
            context.ids[: context.peak],
            context.ids[context.peak : context.peak + 1],
            context.ids[context.peak + 1 :],
        )
    )
    word = at.strip()
    lead = at[: len(at) - len(at.lstrip())] if word else at
    tail = at[len(at.rstrip()) :] if word else ""
    return " ".join(f"{before}{lead}[{word}]{tail}{after}".split())


def _clamp(neuron: Neuron, value: float, site: Site, info: ModelInfo) -> BoundProgram:
    edit = Edit(NeuronEdit((neuron.neuron,), values=(value,)), site, layers=(neuron.layer,))
    return bind(Program((edit,)), info)
