"""Pooled activations of labelled texts, of those by which neurons are found and of those that are held out.

Each window of a document is a text of its own; all windows of a document are in one part (holdout.py).
"""

from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from patchclamp_server.analysis.activations import collect
from patchclamp_server.analysis.corpora.windows import windows
from patchclamp_server.analysis.neurons.localize.holdout import Relabelled, held_out
from patchclamp_server.analysis.neurons.texts import TextSource
from patchclamp_server.analysis.progress import Progress
from patchclamp_server.artifacts.corpora import UNLABELLED
from patchclamp_server.engine.engine import Engine
from patchclamp_server.engine.request import Capture
from patchclamp_server.errors import InvalidArgument
from patchclamp_server.text.prompt import PromptEncoder

MAX_BYTES = 4 << 30
PROGRESS_EVENTS = 100
OTHER, TARGET = 0, 1


@dataclass(frozen=True)
class Comparison:
    """Texts of the label `target` and those of `contrast`, or with None those of all other labels.

    `fraction` of the documents of each label is held out. `documents`: that each kind must have to search by.
    """

    target: int
    contrast: int | None
    fraction: float
    seed: int
    documents: int = 2


@dataclass(frozen=True, eq=False)
class Part:
    """`activations` float32 [texts, layers, width]; `is_target` bool and `documents` int64 [texts]; and `tokens`."""

    activations: Tensor
    is_target: Tensor
    documents: Tensor
    tokens: Sequence[tuple[int, ...]]

    def mean(self) -> Tensor:
        """Returns the mean [layers, width] over the texts of the target."""
        return torch.stack([self.activations[self.is_target, row].mean(0) for row in range(self.activations.shape[1])])


@dataclass(frozen=True, eq=False)
class PooledTexts:
    """`tokens`: of the texts of both parts; `pooled_tokens` and `left_out` int64 [layers] as in Pooled, summed."""

    search: Part
    heldout: Part
    tokens: int
    pooled_tokens: Tensor
    left_out: Tensor

    @property
    def texts(self) -> int:
        return len(self.search.is_target) + len(self.heldout.is_target)


@dataclass(frozen=True, eq=False)
class DividedTexts:
    """`texts`: windows of tokens. Of each, `documents` int64 [texts] says its document, `is_target` and `heldout` bool
    whether it is of the target and held out. `tokens`: of all texts."""

    texts: list[tuple[int, ...]]
    documents: Tensor
    is_target: Tensor
    heldout: Tensor
    tokens: int


async def divided_texts(
    prompts: PromptEncoder,
    source: TextSource,
    compared: Comparison,
    field: str,
    max_bytes: int,
    *,
    text_bytes: int = 0,
    token_bytes: int = 0,
) -> DividedTexts:
    """Returns the windows of the documents of a comparison. Texts of other labels, or of none, are not read.

    Raises InvalidArgument on `field`: too few documents of a kind, or more than `max_bytes` of the activations that
    have `text_bytes` of each text and `token_bytes` of each token.
    """
    labels = source.corpus.document_labels
    kinds = np.where(labels == compared.target, TARGET, OTHER)
    is_other = labels != UNLABELLED if compared.contrast is None else labels == compared.contrast
    kinds[~((labels == compared.target) | is_other)] = UNLABELLED
    corpus = Relabelled(source.corpus, kinds, ("other", source.corpus.labels[compared.target]))
    texts: list[tuple[int, ...]] = []
    documents: list[int] = []
    tokens = 0
    async with aclosing(windows(corpus, prompts, source.window_tokens)) as found:
        async for window in found:
            texts.append(window.tokens)
            documents.append(window.document)
            tokens += len(window.tokens)
            if len(texts) * text_bytes + tokens * token_bytes > max_bytes:
                has = f"{len(texts)} texts have more than {max_bytes} bytes of activations at these layers"
                raise InvalidArgument(field, f"{has}; name fewer layers, or set max_tokens")
            if source.max_tokens and tokens >= source.max_tokens:
                break
    # Of the documents that are run, which `max_tokens` may end.
    n = documents[-1] + 1 if documents else 0
    is_target = corpus.document_labels[:n] == TARGET
    heldout = held_out(labels[corpus.documents[:n]], compared.fraction, compared.seed)
    _check(is_target, heldout, compared, source.corpus.labels, field)
    document_of = torch.tensor(documents)
    own_target, own_heldout = (torch.from_numpy(each)[document_of] for each in (is_target, heldout))
    return DividedTexts(texts, document_of, own_target, own_heldout, tokens)


async def pooled_texts(
    engine: Engine, prompts: PromptEncoder, source: TextSource, capture: Capture, compared: Comparison, field: str
) -> AsyncGenerator[Progress | PooledTexts, None]:
    """Yields progress in texts, then their activations. Texts of other labels, or of none, are not read.

    Raises InvalidArgument on `field`: too few documents of a kind, or more activations than MAX_BYTES. Nothing is run
    then.
    """
    width = engine.model.info.sites[capture.site]
    text_bytes = 4 * len(capture.layers) * width
    divided = await divided_texts(prompts, source, compared, field, MAX_BYTES, text_bytes=text_bytes)
    texts, out = divided.texts, divided.heldout
    parts = [
        Part(
            torch.empty(int(own.sum()), len(capture.layers), width),
            divided.is_target[own],
            divided.documents[own],
            [texts[i] for i in own.nonzero()[:, 0].tolist()],
        )
        for own in (~out, out)
    ]
    # Where each text stands in its part.
    places = torch.where(out, out.cumsum(0), (~out).cumsum(0)) - 1
    pooled_tokens, left_out = torch.zeros(2, len(capture.layers), dtype=torch.int64)
    async with aclosing(collect(engine, texts, capture)) as collected:
        async for index, pooled in collected:
            pooled_tokens += pooled.tokens
            left_out += pooled.left_out
            parts[int(out[index])].activations[places[index]] = pooled.values
            done = index + 1
            if done * PROGRESS_EVENTS // len(texts) > index * PROGRESS_EVENTS // len(texts):
                yield Progress("activations", done, len(texts))
    yield PooledTexts(parts[0], parts[1], divided.tokens, pooled_tokens, left_out)


def _check(
    is_target: NDArray[np.bool_],
    heldout: NDArray[np.bool_],
    compared: Comparison,
    labels: tuple[str, ...],
    field: str,
) -> None:
    other = "all other labels" if compared.contrast is None else f"{labels[compared.contrast]!r:.80}"
    for name, own in ((f"{labels[compared.target]!r:.80}", is_target), (other, ~is_target)):
        searched, judged = int((own & ~heldout).sum()), int((own & heldout).sum())
        if searched < compared.documents or judged < 2:
            needs = f"expected at least {compared.documents} to search by and 2 that are held out"
            raise InvalidArgument(field, f"of {name} there are {searched} texts and {judged} held out; {needs}")
