"""Passes of two models over the same windows: rows of the served one by requests, those of the other in slices at the
engine's exclusive door, and what they have in common into sums, window by window."""

from collections.abc import AsyncGenerator, Mapping
from contextlib import aclosing
from functools import partial

import numpy as np
import torch
from torch import Tensor

from patchclamp_server.analysis.corpora.windows import Window, windows
from patchclamp_server.analysis.neurons.contexts import skipped_tokens
from patchclamp_server.analysis.neurons.correlation_sums import CorrelationSums
from patchclamp_server.analysis.neurons.other_model import activations
from patchclamp_server.analysis.neurons.texts import TextSource
from patchclamp_server.analysis.progress import Progress
from patchclamp_server.analysis.requests import Make, OnEvent, completed, result_of
from patchclamp_server.engine.engine import Engine
from patchclamp_server.engine.exclusive import Sliced
from patchclamp_server.engine.reducers.chosen_units import ChosenUnits
from patchclamp_server.engine.reducers.kept_rows import KeptRows
from patchclamp_server.engine.request import Priority, Reduction, Request, StopParams
from patchclamp_server.errors import RequestError
from patchclamp_server.model.load import LoadedModel
from patchclamp_server.model.sites import Site
from patchclamp_server.model.spec import DecoderSpec
from patchclamp_server.text.prompt import PromptEncoder

MAX_ROW_BYTES = 1 << 30
# While one is run by the other model, the served one is at the next.
WINDOWS_IN_FLIGHT = 2


class TextPass:
    """`passes` over the windows of `source` are to be made in all."""

    def __init__(
        self, engine: Engine, prompts: PromptEncoder, other: LoadedModel, source: TextSource, seed: int, passes: int
    ) -> None:
        self._engine, self._prompts, self._other, self._source = engine, prompts, other, source
        self._seed, self._total, self._before = seed, passes * len(source.corpus), 0
        self._skip = skipped_tokens(prompts)

    async def run(
        self, sums: CorrelationSums, first: Mapping[int, Tensor], second: Mapping[int, Tensor]
    ) -> AsyncGenerator[Progress, None]:
        """Adds the rows of the units `first` of the served model, and of `second` of the other, by layer. Yields
        progress in texts."""
        given: list[_Given] = []

        async def requests() -> AsyncGenerator[Make, None]:
            tokens, most = 0, self._source.max_tokens
            found = windows(self._source.corpus, self._prompts, self._source.window_tokens)
            async with aclosing(found) as each:
                async for window in each:
                    if 0 < most <= tokens:
                        return
                    tokens += len(window.tokens)
                    if len(window.tokens) > self._skip:
                        given.append(_Given(window, tuple(first)))
                        yield partial(given[-1].request, first, self._skip)

        asked = completed(self._engine, requests(), max_in_flight=WINDOWS_IN_FLIGHT, patient=True)
        async with aclosing(asked) as finished:
            try:
                async for _ in finished:
                    own = given.pop(0)
                    await result_of(self._engine, self._add(sums, own, second))
                    yield Progress("texts", self._before + own.window.document, self._total)
            except RequestError as error:
                # A client has sent no prompt: that a window cannot run is a matter of its length.
                error.field = "window_tokens" if error.field == "prompt" else error.field
                raise
        self._before += len(self._source.corpus)
        yield Progress("texts", self._before, self._total)

    def _add(self, sums: CorrelationSums, given: "_Given", second: Mapping[int, Tensor]) -> Sliced[None]:
        window = given.window
        theirs = yield from activations(self._other, window.tokens, second, self._skip)
        own = {layer: given.rows.rows(layer) for layer in given.rows.layers}
        shuffled = np.random.default_rng((self._seed, window.number)).permutation(len(window.tokens) - self._skip)
        order = torch.from_numpy(shuffled).to(self._other.decoder.device)
        yield from sums.add(own, theirs, order, row_products(self._other.decoder.spec))


class _Given:
    """A window that is with the engine, and its rows."""

    def __init__(self, window: Window, layers: tuple[int, ...]) -> None:
        self.window, self.rows = window, KeptRows(layers)

    def request(self, units: Mapping[int, Tensor], skip: int, on_event: OnEvent) -> Request:
        taken = Reduction(Site.MLP_POST, ChosenUnits(units, (self.rows,), skip=skip))
        stop = StopParams(max_tokens=0)
        return Request(self.window.tokens, on_event, stop=stop, priority=Priority.ANALYSIS, reductions=(taken,))


def row_bytes(window_tokens: int, first: int, second: int) -> int:
    """What the rows of so many units of both models take, with those of the sums without their shift."""
    return 4 * window_tokens * ((WINDOWS_IN_FLIGHT + 1) * first + 2 * second)


def row_products(spec: DecoderSpec) -> float:
    """Multiplications of one token through all blocks."""
    heads = 2 * (spec.n_heads + spec.n_kv_heads) * spec.head_dim
    neurons = spec.d_ff * (3 if spec.family.gated else 2)
    return float(spec.n_layers * spec.d_model * (heads + neurons))
