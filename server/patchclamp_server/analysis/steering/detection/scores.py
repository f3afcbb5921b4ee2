"""Scores of texts: values of rows (detectors.py) at layers, pooled over the tokens of a text.

    last   of the last token that is no attention sink      mean   over tokens but sinks
    max    the largest over all tokens but the first

What joins layers or values of a token has its largest score besides, over all tokens but the first. A text of several
windows has the last of its last window, the mean over the tokens of all, and the largest of all; a single token that is
left over for a window of its own, which would be a sink, is not read. Everything is read in one pass over each window;
states stay on the device.
"""

from collections.abc import AsyncGenerator, AsyncIterator, Mapping, Sequence
from contextlib import aclosing
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from torch import Tensor

from patchclamp_server.analysis.corpora.windows import Window, windows
from patchclamp_server.analysis.neurons.texts import TextSource
from patchclamp_server.analysis.requests import Make, OnEvent, completed
from patchclamp_server.analysis.steering.detection.detectors import Join, Rows
from patchclamp_server.engine.engine import Engine
from patchclamp_server.engine.reducers.pooled_text import PooledText
from patchclamp_server.engine.reducers.summed_layers import SummedLayers
from patchclamp_server.engine.request import Priority, Reduction, Request, StopParams
from patchclamp_server.interventions.pooling import Pooling
from patchclamp_server.model.sites import Site
from patchclamp_server.text.prompt import PromptEncoder


@dataclass(frozen=True, eq=False)
class Place:
    """Rows at a site and layer."""

    site: Site
    layer: int
    rows: Rows


@dataclass(frozen=True, eq=False)
class Joined:
    """Values at several layers, or several of one, of which `join` makes the score of a token. `rows`: by layer, the
    first `n_own` columns for `join`, and others whose sums over layers are scores of their own."""

    site: Site
    rows: Mapping[int, Rows]
    join: Join
    n_own: int

    def largest(self, sums: Tensor) -> Tensor:
        """Returns the largest scores, that of `join` first, of sums [tokens, columns] of a window."""
        # The first token is not scored, unless there is no other.
        table = sums[1:].double() if len(sums) > 1 else sums.double()
        own = np.max(self.join(table[:, : self.n_own].numpy()))
        return torch.cat((torch.tensor([own], dtype=torch.float64), table[:, self.n_own :].amax(0)))


@dataclass(frozen=True, eq=False)
class ScoredText:
    """`scores`: float64 [poolings, k of the place], by place. `largest`: float64, by what is joined."""

    document: int
    label: int
    scores: list[Tensor]
    largest: list[Tensor]


async def scored_texts(
    engine: Engine,
    prompts: PromptEncoder,
    source: TextSource,
    places: Sequence[Place],
    poolings: Sequence[Pooling],
    joined: Sequence[Joined] = (),
) -> AsyncGenerator[ScoredText, None]:
    """Yields the texts in order, each as soon as it has run; ends with the first window that reaches `max_tokens`."""
    pending: list[tuple[Window, _Reader]] = []

    async def makes() -> AsyncIterator[Make]:
        tokens = 0
        async with aclosing(windows(source.corpus, prompts, source.window_tokens)) as found:
            async for window in found:
                if window.is_left_over:
                    continue
                reader = _Reader(places, poolings, joined, len(window.tokens))
                pending.append((window, reader))
                yield partial(_request, window.tokens, reader.reductions)
                tokens += len(window.tokens)
                if 0 < source.max_tokens <= tokens:
                    return

    text: _Text | None = None
    async with aclosing(completed(engine, makes(), patient=True)) as finished:
        async for _ in finished:
            window, reader = pending.pop(0)
            if text is not None and text.document != window.document:
                yield text.scored()
                text = None
            if text is None:
                text = _Text(window.document, window.label, poolings)
            text.add(reader.pooled(), reader.largest())
            if window.is_last:
                yield text.scored()
                text = None
    if text is not None:
        yield text.scored()


class _Reader:
    """Pools one window at all places."""

    def __init__(
        self, places: Sequence[Place], poolings: Sequence[Pooling], joined: Sequence[Joined], tokens: int
    ) -> None:
        self._places, self._poolings, self._joined = places, poolings, joined
        by_site: dict[Site, dict[int, Rows]] = {}
        for place in places:
            by_site.setdefault(place.site, {})[place.layer] = place.rows
        self._readers = {
            site: PooledText(tuple(sorted(rows)), tokens, poolings, partial(_values, rows))
            for site, rows in by_site.items()
        }
        self._sums = [
            SummedLayers(tuple(sorted(each.rows)), tokens, partial(_values, each.rows)) for each in self._joined
        ]
        self.reductions = (
            *(Reduction(site, reader) for site, reader in self._readers.items()),
            *(Reduction(each.site, reader) for each, reader in zip(joined, self._sums, strict=True)),
        )

    def largest(self) -> list[Tensor]:
        return [each.largest(reader.sums()) for each, reader in zip(self._joined, self._sums, strict=True)]

    def pooled(self) -> list[list[tuple[Tensor, int]]]:
        """Returns by place and pooling the scores [k], and how many tokens they are of."""
        return [
            [self._readers[place.site].pooled(place.layer, pooling) for pooling in self._poolings]
            for place in self._places
        ]


class _Text:
    """A text whose windows come one after the other."""

    def __init__(self, document: int, label: int, poolings: Sequence[Pooling]) -> None:
        self.document, self._label, self._poolings = document, label, poolings
        self._values: list[list[Tensor]] = []
        self._tokens: list[list[int]] = []
        self._largest: list[Tensor] = []

    def add(self, window: list[list[tuple[Tensor, int]]], largest: list[Tensor]) -> None:
        values = [[each.double() for each, _ in place] for place in window]
        tokens = [[n for _, n in place] for place in window]
        if self._values:
            for at, place in enumerate(values):
                for i, pooling in enumerate(self._poolings):
                    before, n, own = self._values[at][i], self._tokens[at][i], tokens[at][i]
                    if pooling is Pooling.MAX:
                        place[i] = torch.maximum(before, place[i])
                    elif pooling is Pooling.MEAN:
                        place[i] = (n * before + own * place[i]) / (n + own)
                        tokens[at][i] = n + own
            largest = [torch.maximum(*both) for both in zip(self._largest, largest, strict=True)]
        self._values, self._tokens, self._largest = values, tokens, largest

    def scored(self) -> ScoredText:
        return ScoredText(self.document, self._label, [torch.stack(place) for place in self._values], self._largest)


def _values(rows: Mapping[int, Rows], layer: int, states: Tensor) -> Tensor:
    return rows[layer].values(states)


def _request(ids: tuple[int, ...], reductions: tuple[Reduction, ...], on_event: OnEvent) -> Request:
    stop = StopParams(max_tokens=0)
    return Request(ids, on_event, stop=stop, priority=Priority.ANALYSIS, reductions=reductions)
