"""Pooled activations of labelled texts in two parts: neurons are found by one, and judged by the other.

Each window of a text is a text of its own. Windows of every label are dealt out at random, so that the share that is
held out is the same for all; at least two of a label are kept on both sides where it has four.
"""

from collections.abc import AsyncGenerator
from contextlib import aclosing
from dataclasses import dataclass

import torch
from torch import Tensor

from patchclamp_server.analysis.activations import collect
from patchclamp_server.analysis.corpora.windows import windows
from patchclamp_server.analysis.neurons.texts import TextSource
from patchclamp_server.analysis.progress import Progress
from patchclamp_server.artifacts.corpora import UNLABELLED
from patchclamp_server.engine.engine import Engine
from patchclamp_server.engine.request import Capture
from patchclamp_server.errors import InvalidArgument
from patchclamp_server.text.prompt import PromptEncoder

MAX_BYTES = 4 << 30
PROGRESS_EVENTS = 100


@dataclass(frozen=True, eq=False)
class PooledTexts:
    """`activations` float32 [texts, layers, d_ff]; `labels` int64 and `heldout` bool [texts]; `tokens` of all texts."""

    activations: Tensor
    labels: Tensor
    heldout: Tensor
    tokens: int

    def part(self, layer: int, *, heldout: bool) -> tuple[Tensor, Tensor]:
        """Returns activations [texts, d_ff] and labels [texts] of one part; `layer` is a place in the layers."""
        own = self.heldout if heldout else ~self.heldout
        return self.activations[own, layer], self.labels[own]


async def pooled_texts(
    engine: Engine,
    prompts: PromptEncoder,
    source: TextSource,
    capture: Capture,
    *,
    holdout_fraction: float,
    seed: int,
    field: str,
) -> AsyncGenerator[Progress | PooledTexts, None]:
    """Yields progress in texts, then their activations. Texts without a label are left out.

    Raises InvalidArgument on `field`: fewer than two labels, a label with fewer than four texts, or more
    activations than MAX_BYTES.
    """
    texts: list[tuple[int, ...]] = []
    labels: list[int] = []
    tokens = 0
    width = engine.model.info.d_ff * len(capture.layers) * 4
    async with aclosing(windows(source.corpus, prompts, source.window_tokens)) as found:
        async for window in found:
            if window.label == UNLABELLED:
                continue
            texts.append(window.tokens)
            labels.append(window.label)
            tokens += len(window.tokens)
            if len(texts) * width > MAX_BYTES:
                has = f"{len(texts)} texts have more than {MAX_BYTES} bytes of activations at these layers"
                message = f"{has}; name fewer layers, or set max_tokens"
                raise InvalidArgument(field, message)
            if source.max_tokens and tokens >= source.max_tokens:
                break
    by_label = torch.tensor(labels, dtype=torch.int64)
    heldout = _held_out(by_label, source, holdout_fraction, seed, field)
    activations = torch.empty(len(texts), len(capture.layers), engine.model.info.d_ff)
    async with aclosing(collect(engine, texts, capture)) as collected:
        async for index, pooled in collected:
            activations[index] = pooled.values
            done = index + 1
            if done * PROGRESS_EVENTS // len(texts) > index * PROGRESS_EVENTS // len(texts):
                yield Progress("activations", done, len(texts))
    yield PooledTexts(activations, by_label, heldout, tokens)


def _held_out(labels: Tensor, source: TextSource, fraction: float, seed: int, field: str) -> Tensor:
    names = source.corpus.labels
    if len(set(labels.tolist())) < 2:
        raise InvalidArgument(field, "expected texts of at least two labels")
    heldout = torch.zeros(len(labels), dtype=torch.bool)
    generator = torch.Generator().manual_seed(seed)
    for label in sorted(set(labels.tolist())):
        places = (labels == label).nonzero()[:, 0]
        if len(places) < 4:
            message = f"{names[label]!r:.80} has {len(places)} texts; expected at least four of a label"
            raise InvalidArgument(field, message)
        n = min(max(2, round(fraction * len(places))), len(places) - 2)
        heldout[places[torch.randperm(len(places), generator=generator)[:n]]] = True
    return heldout
