"""Where neurons are largest over texts, with what they are at every token around.

    max_w      over the tokens w of a window, but for the first, where attention has its sinks, and special ones before
               it; a context stands around the largest token of each of the windows with the largest max_w
    rate       share of those tokens at which a > 0;     mean, max     of a over them

One pass over all windows finds the places; the windows that have any are then run again, and what their tokens hold of
the neurons is kept. The largest values may differ in their last bits between both, unless the model is batch-invariant:
those returned are of the second pass.
"""

from collections import defaultdict
from collections.abc import AsyncGenerator, Iterator, Sequence
from contextlib import aclosing
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import Tensor

from patchclamp_server.analysis.corpora.run import CorpusJob, run_corpus
from patchclamp_server.analysis.corpora.windows import Cut, Window, place_of, windows
from patchclamp_server.analysis.neurons.texts import TextSource
from patchclamp_server.analysis.progress import Progress, Steps
from patchclamp_server.analysis.requests import Make, OnEvent, completed
from patchclamp_server.artifacts.neuron_sets import Neuron
from patchclamp_server.engine.engine import Engine
from patchclamp_server.engine.reducers.chosen_units import ChosenUnits
from patchclamp_server.engine.reducers.firing import Firing
from patchclamp_server.engine.reducers.kept_rows import KeptRows
from patchclamp_server.engine.reducers.largest_of_texts import LargestOfTexts
from patchclamp_server.engine.reducers.moments import Moments
from patchclamp_server.engine.request import Priority, Reduction, Request, StopParams
from patchclamp_server.errors import InvalidArgument
from patchclamp_server.model.sites import Site
from patchclamp_server.text.prompt import PromptEncoder


@dataclass(frozen=True, eq=False)
class NeuronContext:
    """Tokens `ids` of the document of this index, with the value [n] of the neuron at each; the largest is
    `ids[peak]`, and `position` of the document."""

    document: int
    position: int
    ids: tuple[int, ...]
    values: Tensor
    peak: int

    @property
    def value(self) -> float:
        return float(self.values[self.peak])


@dataclass(frozen=True)
class Place:
    """A token of the window of a number: `tokens[position]`."""

    window: int
    position: int


@dataclass(frozen=True)
class Activity:
    """What a neuron did over all texts. `places`: those of its contexts, the largest first."""

    tokens: int
    rate: float
    mean: float
    max: float
    places: tuple[Place, ...]


@dataclass(frozen=True, eq=False)
class Recording:
    """What is recorded: `contexts` places of each neuron, and the largest value of others."""

    source: TextSource
    site: Site
    neurons: tuple[Neuron, ...]
    contexts: int
    others: tuple[Neuron, ...] = ()


@dataclass(frozen=True, eq=False)
class Recorded:
    activities: dict[Neuron, Activity]
    # Of the others.
    largest: dict[Neuron, float] = field(default_factory=dict)


def skipped_tokens(encoder: PromptEncoder) -> int:
    """Tokens at the start of every window that nothing is measured at."""
    return max(1, len(encoder.text_start))


async def record(engine: Engine, encoder: PromptEncoder, job: Recording) -> AsyncGenerator[Progress | Recorded, None]:
    """Yields progress in texts, then what was recorded. Raises InvalidArgument as run_corpus, and on "texts" without a
    token that counts."""
    own, others, skip = _by_layer(job.neurons), _by_layer(job.others), skipped_tokens(encoder)
    largest, firing, moments = LargestOfTexts(tuple(own), job.contexts), Firing(tuple(own)), Moments(tuple(own))
    beside = Moments(tuple(others))
    taken = [ChosenUnits(_indices(own), (largest, firing, moments), skip=skip)]
    if others:
        taken.append(ChosenUnits(_indices(others), (beside,), skip=skip))
    source = job.source
    pass_over = CorpusJob(
        source.corpus, tuple(Reduction(job.site, each) for each in taken), source.window_tokens, source.max_tokens
    )
    async with aclosing(run_corpus(engine, encoder, pass_over)) as events:
        async for event in events:
            yield Progress("texts", event.documents, event.total_documents)
    activities: dict[Neuron, Activity] = {}
    for layer, neurons in own.items():
        tokens = moments.count(layer)
        if not tokens:
            raise InvalidArgument("texts", "have no token beyond the first of each window; expected longer texts")
        found = largest.largest(layer)
        columns = zip(
            neurons,
            firing.rates(layer).tolist(),
            moments.mean(layer).tolist(),
            moments.largest(layer).tolist(),
            found.texts.tolist(),
            found.positions.tolist(),
            strict=True,
        )
        for neuron, rate, mean, top, texts, positions in columns:
            places = tuple(Place(text, at) for text, at in zip(texts, positions, strict=True) if text >= 0)
            activities[neuron] = Activity(tokens, rate, mean, top, places)
    tops = {n: top for layer, of in others.items() for n, top in zip(of, beside.largest(layer).tolist(), strict=True)}
    yield Recorded(activities, tops)


async def contexts_of(
    engine: Engine, encoder: PromptEncoder, job: Recording, recorded: Recorded, around: int
) -> AsyncGenerator[Progress | dict[Neuron, tuple[NeuronContext, ...]], None]:
    """Yields progress in windows, then the contexts of each neuron, the largest first: `around` tokens before and after
    each place, as far as the window has them; special tokens that start it are none of them."""
    wanted: defaultdict[int, list[tuple[Neuron, int, int]]] = defaultdict(list)
    for neuron, activity in recorded.activities.items():
        for rank, place in enumerate(activity.places):
            wanted[place.window].append((neuron, rank, place.position))
    steps, special = Steps("contexts", len(wanted)), len(encoder.text_start)
    found: defaultdict[Neuron, dict[int, NeuronContext]] = defaultdict(dict)
    given: list[_Given] = []

    async def requests() -> AsyncGenerator[Make, None]:
        async with aclosing(_windows(job.source, encoder, sorted(wanted))) as them:
            async for window in them:
                given.append(_Given(window, _by_layer(dict.fromkeys(n for n, _, _ in wanted[window.number]))))
                yield partial(given[-1].request, job.site)

    async with aclosing(completed(engine, requests(), patient=True)) as finished:
        async for _ in finished:
            window = given.pop(0)
            for neuron, rank, position in wanted[window.window.number]:
                found[neuron][rank] = window.context(neuron, position, around, special)
            yield steps.advance()
    yield {neuron: tuple(own[rank] for rank in sorted(own)) for neuron, own in found.items()}


class _Given:
    """A window that runs again, and what its tokens hold of some neurons."""

    def __init__(self, window: Window, neurons: dict[int, list[Neuron]]) -> None:
        self.window, self._neurons = window, neurons
        self._rows = KeptRows(tuple(neurons))

    def request(self, site: Site, on_event: OnEvent) -> Request:
        taken = Reduction(site, ChosenUnits(_indices(self._neurons), (self._rows,)), text=self.window.number)
        stop = StopParams(max_tokens=0)
        return Request(self.window.tokens, on_event, stop=stop, priority=Priority.ANALYSIS, reductions=(taken,))

    def context(self, neuron: Neuron, position: int, around: int, special: int) -> NeuronContext:
        first, end = max(special, position - around), min(len(self.window.tokens), position + around + 1)
        column = self._neurons[neuron.layer].index(neuron)
        values = self._rows.rows(neuron.layer)[first:end, column].cpu()
        in_document = self.window.start + position - special
        return NeuronContext(self.window.document, in_document, self.window.tokens[first:end], values, position - first)


async def _windows(source: TextSource, encoder: PromptEncoder, numbers: Sequence[int]) -> AsyncGenerator[Window, None]:
    """Those of ascending numbers; a document is tokenised once."""
    for document, own in _by_document(numbers):
        sought = set(own)
        cut = Cut(document, place_of(own[0])[1])
        async with aclosing(windows(source.corpus, encoder, source.window_tokens, cut)) as found:
            async for window in found:
                if window.number in sought:
                    sought.remove(window.number)
                    yield window
                if not sought:
                    break


def _by_document(numbers: Sequence[int]) -> Iterator[tuple[int, list[int]]]:
    grouped: defaultdict[int, list[int]] = defaultdict(list)
    for number in numbers:
        grouped[place_of(number)[0]].append(number)
    yield from grouped.items()


def _by_layer(neurons: "Sequence[Neuron] | dict[Neuron, None]") -> dict[int, list[Neuron]]:
    found: defaultdict[int, list[Neuron]] = defaultdict(list)
    for neuron in neurons:
        found[neuron.layer].append(neuron)
    return dict(found)


def _indices(neurons: dict[int, list[Neuron]]) -> dict[int, Tensor]:
    return {layer: torch.tensor([neuron.neuron for neuron in own]) for layer, own in neurons.items()}
