"""What an edit of neurons is judged by: facts, texts and generated text. Each test is a group of ordinary requests.

    accuracy          share of facts whose answer is likelier than every other candidate
    log_probability   mean over facts of log p(answer | prompt), nats
    perplexity        exp of the mean negative log-probability of the tokens of texts
    divergence        mean over the tokens of texts of KL(unedited ‖ edited), nats
    words             share of greedy texts that have any of the words
    probe             share of greedy texts whose generated tokens have a mean projection h · v / |v| above a midpoint,
                      read by the unedited model

Candidates of several tokens are compared by the sum of their log-probabilities, as the answer is.
"""

from collections.abc import AsyncGenerator, Callable, Sequence
from contextlib import aclosing
from dataclasses import dataclass
from enum import Enum
from functools import partial
from typing import TypeAlias

import torch
from torch import Tensor

from patchclamp_server.analysis.neurons.intervals import Items
from patchclamp_server.analysis.requests import Make, OnEvent, completed, score_request
from patchclamp_server.engine.engine import Engine
from patchclamp_server.engine.reducers.divergence import Divergence, Reference, ScoreReducer
from patchclamp_server.engine.request import (
    Event,
    Priority,
    Readouts,
    Request,
    StopParams,
    Text,
    Token,
)
from patchclamp_server.interventions.bound import BoundProgram

Ids: TypeAlias = tuple[int, ...]
# Of predictions of the unedited model that are kept at a time, or those of one window.
KEPT_BYTES = 256 << 20


class Metric(Enum):
    """The names of the enum NeuronMetric, in lower case and without its prefix."""

    ACCURACY = "accuracy"
    LOG_PROBABILITY = "log_probability"
    PERPLEXITY = "perplexity"
    DIVERGENCE = "divergence"
    WORDS = "words"
    PROBE = "probe"


def transform(metric: Metric) -> Callable[[Tensor], Tensor]:
    """Returns f of intervals.py."""
    return torch.exp if metric is Metric.PERPLEXITY else lambda mean: mean


# Items of each metric, for one program.
Measured: TypeAlias = dict[Metric, Items]
Programs: TypeAlias = Sequence[BoundProgram | None]


@dataclass(frozen=True)
class Fact:
    """`prompt` is continued by `candidates[0]`, the answer; the others are what it is compared with."""

    prompt: Ids
    candidates: tuple[Ids, ...]


@dataclass(frozen=True)
class FactsTest:
    name: str
    facts: tuple[Fact, ...]

    @property
    def requests(self) -> int:
        return sum(len(fact.candidates) for fact in self.facts)

    async def measure(self, engine: Engine, programs: Programs) -> AsyncGenerator[int | list[Measured], None]:
        """Yields the number of requests that have ended, each time some have; then what came of each program."""
        makes: list[Make] = [
            partial(score_request, fact.prompt, candidate, program)
            for program in programs
            for fact in self.facts
            for candidate in fact.candidates
        ]
        logprobs: list[float] = []
        async with aclosing(completed(engine, makes)) as finished:
            async for events in finished:
                logprobs.append(sum(_logprobs(events)))
                yield 1
        yield [self._measured(own) for own in _parts(logprobs, len(programs))]

    def _measured(self, logprobs: Sequence[float]) -> Measured:
        right, own, at = [], [], 0
        for fact in self.facts:
            answer, *others = logprobs[at : at + len(fact.candidates)]
            right.append(float(all(answer > other for other in others)))
            own.append(answer)
            at += len(fact.candidates)
        return {Metric.ACCURACY: _means(right), Metric.LOG_PROBABILITY: _means(own)}


@dataclass(frozen=True)
class TextsTest:
    """`windows`: each of at least two tokens."""

    name: str
    windows: tuple[Ids, ...]

    @property
    def requests(self) -> int:
        return len(self.windows)

    async def measure(self, engine: Engine, programs: Programs) -> AsyncGenerator[int | list[Measured], None]:
        """As FactsTest.measure. The first program is the one that the others are compared with."""
        found: list[list[tuple[float, float, int]]] = [[] for _ in programs]
        kept = 4 * engine.model.info.vocab_size * max(map(len, self.windows))
        few = max(1, KEPT_BYTES // kept)
        for start in range(0, len(self.windows), few):
            windows = self.windows[start : start + few]
            references = [Reference(1) for _ in windows]
            for own, program in zip(found, programs, strict=True):
                is_reference = own is found[0]
                compared = [Divergence(reference) for reference in references]
                scores: Sequence[ScoreReducer] = references if is_reference else compared
                makes = [partial(_text, ids, program, into) for ids, into in zip(windows, scores, strict=True)]
                async with aclosing(completed(engine, makes)) as finished:
                    done = 0
                    async for events in finished:
                        divergence = 0.0 if is_reference else compared[done].means()[0]
                        logprobs = _logprobs(events)
                        own.append((-sum(logprobs), divergence * len(logprobs), len(logprobs)))
                        done += 1
                        yield 1
        yield [{Metric.PERPLEXITY: _items(own, 0), Metric.DIVERGENCE: _items(own, 1)} for own in found]


@dataclass(frozen=True, eq=False)
class Probe:
    """`program` has one readout, a projection at generated tokens; texts with a mean above `midpoint` count."""

    program: BoundProgram
    midpoint: float


@dataclass(frozen=True, eq=False)
class GenerationTest:
    name: str
    prompts: tuple[Ids, ...]
    max_tokens: int
    words: tuple[str, ...] = ()
    probe: Probe | None = None

    @property
    def requests(self) -> int:
        return len(self.prompts) * (1 if self.probe is None else 2)

    async def measure(self, engine: Engine, programs: Programs) -> AsyncGenerator[int | list[Measured], None]:
        """As FactsTest.measure."""
        makes: list[Make] = [
            partial(_generate, prompt, self.max_tokens, program) for program in programs for prompt in self.prompts
        ]
        texts: list[str] = []
        generated: list[Ids] = []
        async with aclosing(completed(engine, makes)) as finished:
            async for events in finished:
                texts.append("".join(event.text for event in events if isinstance(event, Text)))
                generated.append(tuple(event.id for event in events if isinstance(event, Token)))
                yield 1
        measured: list[Measured] = [{} for _ in programs]
        if self.words:
            has = [float(any(word.casefold() in text.casefold() for word in self.words)) for text in texts]
            for own, part in zip(measured, _parts(has, len(programs)), strict=True):
                own[Metric.WORDS] = _means(part)
        if self.probe is not None:
            above: list[float] = []
            async for done in self._read(engine, self.probe, generated, above):
                yield done
            for own, part in zip(measured, _parts(above, len(programs)), strict=True):
                own[Metric.PROBE] = _means(part)
        yield measured

    async def _read(
        self, engine: Engine, probe: Probe, generated: Sequence[Ids], above: list[float]
    ) -> AsyncGenerator[int, None]:
        """Appends for each text whether the probe is above its midpoint; one without tokens is not."""
        prompts = [prompt for _ in range(len(generated) // len(self.prompts)) for prompt in self.prompts]
        read = [(prompt, ids) for prompt, ids in zip(prompts, generated, strict=True) if ids]
        makes = [partial(score_request, prompt, ids, probe.program) for prompt, ids in read]
        means: list[float] = []
        async with aclosing(completed(engine, makes)) as finished:
            async for events in finished:
                values = [v.values[0] for event in events if isinstance(event, Readouts) for v in event.values]
                means.append(sum(values) / len(values))
                yield 1
        remaining = iter(means)
        above += [float(next(remaining) > probe.midpoint) if ids else 0.0 for ids in generated]


Test: TypeAlias = FactsTest | TextsTest | GenerationTest


def _text(ids: Ids, program: BoundProgram | None, scores: ScoreReducer, on_event: OnEvent) -> Request:
    return Request(ids, on_event, program, priority=Priority.ANALYSIS, score_from=1, scores=scores)


def _generate(prompt: Ids, max_tokens: int, program: BoundProgram | None, on_event: OnEvent) -> Request:
    return Request(prompt, on_event, program, stop=StopParams(max_tokens=max_tokens), priority=Priority.ANALYSIS)


def _logprobs(events: Sequence[Event]) -> list[float]:
    return [event.logprob or 0.0 for event in events if isinstance(event, Token)]


def _parts(values: Sequence[float], n: int) -> list[Sequence[float]]:
    size = len(values) // n
    return [values[i * size : (i + 1) * size] for i in range(n)]


def _means(values: Sequence[float]) -> Items:
    x = torch.tensor(values, dtype=torch.float64)
    return Items(x, torch.ones_like(x))


def _items(windows: Sequence[tuple[float, float, int]], which: int) -> Items:
    """Returns one of the two sums of each window, with its tokens as weight."""
    table = torch.tensor(windows, dtype=torch.float64)
    return Items(table[:, which], table[:, 2])
