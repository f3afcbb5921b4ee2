"""Features of an autoencoder, sought by what texts, tokens, a direction or a label say of them.

    texts, tokens   the score of statistics.py: tokens of the target against those of the contrast, or all others
    direction       the cosine of a decoder row with it
    label           the share of a label that the text which is sought makes up, without regard to case

Special tokens in front of a text and the first token of each window are left out: attention rests on them.
"""

import asyncio
from collections.abc import AsyncGenerator
from contextlib import aclosing
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
import torch
from torch import Tensor

from patchclamp_server.analysis.corpora.run import CorpusJob, run_corpus
from patchclamp_server.analysis.features.statistics import BATCH_TOKENS, NO_SIDE, FeatureStatistics
from patchclamp_server.analysis.neurons.texts import TextSource
from patchclamp_server.analysis.neurons.weights import Unembedding
from patchclamp_server.analysis.progress import Progress
from patchclamp_server.artifacts.autoencoders import Autoencoder
from patchclamp_server.artifacts.corpora import UNLABELLED
from patchclamp_server.artifacts.feature_labels import FeatureLabels
from patchclamp_server.artifacts.tensor_file import blocks
from patchclamp_server.cpu.row_extremes import row_extremes
from patchclamp_server.engine.engine import Engine
from patchclamp_server.engine.reducers.whole_texts import TextRows, WholeTexts
from patchclamp_server.errors import InvalidArgument
from patchclamp_server.model.decoder import Decoder
from patchclamp_server.model.sites import RESIDUAL_SITES, Site
from patchclamp_server.text.prompt import PromptEncoder

PROMOTED = 10
# What a feature writes at these is added to the residual stream.
_WRITE_TO_RESIDUAL = (*RESIDUAL_SITES, Site.ATTN_OUT, Site.MLP_OUT)
# Products with the vocabulary are made for so many features at a time.
_PROMOTED_AT_ONCE = 16


@dataclass(frozen=True, eq=False)
class ByContrast:
    """Numbers of labels; `contrast` is None for all other labels."""

    texts: TextSource
    target: int
    contrast: int | None = None


@dataclass(frozen=True, eq=False)
class ByTokens:
    texts: TextSource
    ids: tuple[int, ...]


@dataclass(frozen=True, eq=False)
class ByDirection:
    """`direction` [output width], of length 1."""

    direction: Tensor


@dataclass(frozen=True)
class ByLabel:
    text: str


@dataclass(frozen=True, eq=False)
class FeatureSearch:
    autoencoder: Autoencoder
    by: ByContrast | ByTokens | ByDirection | ByLabel
    labels: FeatureLabels | None = None
    top_k: int = 20


@dataclass(frozen=True)
class PromotedToken:
    id: int
    product: float


@dataclass(frozen=True)
class FoundFeature:
    feature: int
    score: float
    target_mean: float = 0.0
    contrast_mean: float = 0.0
    rate: float = 0.0
    label: str = ""
    promotes: tuple[PromotedToken, ...] = ()


@dataclass(frozen=True)
class FoundFeatures:
    """Numbers of texts are 0 where none were run."""

    features: tuple[FoundFeature, ...]
    active_features: int = 0
    tokens: int = 0
    explained_variance: float = 0.0
    mean_active: float = 0.0


Event: TypeAlias = Progress | FoundFeatures


async def search(engine: Engine, prompts: PromptEncoder, job: FeatureSearch) -> AsyncGenerator[Event, None]:
    """Yields progress in documents where texts are run, then what was found, the best first.

    Raises InvalidArgument where no token of a side was run.
    """
    if isinstance(job.by, ByContrast | ByTokens):
        statistics = FeatureStatistics(job.autoencoder)
        async with aclosing(_run(engine, prompts, job, job.by, statistics)) as progress:
            async for event in progress:
                yield event
        found = await asyncio.to_thread(_of_statistics, statistics, job.top_k)
    elif isinstance(job.by, ByDirection):
        found = await asyncio.to_thread(_along, job.autoencoder, job.by.direction, job.top_k)
    else:
        assert job.labels is not None
        found = await asyncio.to_thread(_named, job.labels, job.by.text, job.top_k)
    yield await asyncio.to_thread(_described, engine.model.decoder, job, found)


async def _run(
    engine: Engine,
    prompts: PromptEncoder,
    job: FeatureSearch,
    by: ByContrast | ByTokens,
    statistics: FeatureStatistics,
) -> AsyncGenerator[Progress, None]:
    spec = job.autoencoder.spec
    places = [(spec.site, spec.layer)]
    if spec.is_transcoder:
        places.append((spec.output_site, spec.output_layer))
    texts, waiting = WholeTexts(places), _Waiting(by, max(1, len(prompts.text_start)))
    corpus_job = CorpusJob(by.texts.corpus, texts.reductions, by.texts.window_tokens, by.texts.max_tokens)
    async with aclosing(run_corpus(engine, prompts, corpus_job)) as progress:
        async for event in progress:
            waiting.add(texts.take())
            if waiting.tokens >= BATCH_TOKENS:
                await asyncio.to_thread(statistics.add, *waiting.take())
            yield Progress("documents", event.documents, event.total_documents)
    waiting.add(texts.take())
    if waiting.tokens:
        await asyncio.to_thread(statistics.add, *waiting.take())
    for side in (0, 1):
        if not statistics.tokens_of(side):
            raise InvalidArgument(*_missing(by, side))


class _Waiting:
    """Rows that wait for others, so that the matrices are read once for many; `first`: of a text that are counted."""

    def __init__(self, by: ByContrast | ByTokens, first: int) -> None:
        self._by, self._first = by, first
        self._parts: list[tuple[Tensor, Tensor, Tensor]] = []
        self.tokens = 0

    def add(self, texts: list[TextRows]) -> None:
        for text in texts:
            rows = [each[self._first :] for each in text.rows]
            if len(rows[0]):
                self._parts.append((rows[0], rows[-1], self._sides(text)))
                self.tokens += len(rows[0])

    def take(self) -> tuple[Tensor, Tensor, Tensor]:
        inputs, outputs, sides = (torch.cat(parts) for parts in zip(*self._parts, strict=True))
        self._parts, self.tokens = [], 0
        return inputs, outputs, sides

    def _sides(self, text: TextRows) -> Tensor:
        ids = text.ids[self._first :]
        if isinstance(self._by, ByTokens):
            return torch.from_numpy(np.where(np.isin(ids, self._by.ids), 0, 1))
        side = NO_SIDE
        if text.label == self._by.target:
            side = 0
        elif text.label != UNLABELLED and self._by.contrast in (None, text.label):
            side = 1
        return torch.full((len(ids),), side)


def _missing(by: ByContrast | ByTokens, side: int) -> tuple[str, str]:
    if isinstance(by, ByTokens):
        return (
            ("tokens.tokens", "none of them is in the texts that were run")
            if side == 0
            else (
                "tokens.texts",
                "no other token is in the texts that were run",
            )
        )
    name = "target" if side == 0 else "contrast"
    return f"contrast.{name}", "no tokens of it were run; raise max_tokens"


def _of_statistics(statistics: FeatureStatistics, top_k: int) -> FoundFeatures:
    scores, means, rates = statistics.scores(), statistics.means(), statistics.rates()
    best = scores.argsort(descending=True, stable=True)[:top_k].tolist()
    features = tuple(
        FoundFeature(i, float(scores[i]), float(means[0, i]), float(means[1, i]), float(rates[i])) for i in best
    )
    return FoundFeatures(
        features,
        statistics.active_features,
        statistics.tokens,
        statistics.explained_variance,
        statistics.mean_active,
    )


def _along(autoencoder: Autoencoder, direction: Tensor, top_k: int) -> FoundFeatures:
    cosines = []
    for _, rows in blocks(autoencoder.file, "decoder"):
        rows = rows.float()
        cosines.append(rows @ direction / rows.norm(dim=1).clamp_min(torch.finfo(torch.float32).tiny))
    found = torch.cat(cosines)
    best = found.argsort(descending=True, stable=True)[:top_k].tolist()
    return FoundFeatures(tuple(FoundFeature(i, float(found[i])) for i in best))


def _named(labels: FeatureLabels, text: str, top_k: int) -> FoundFeatures:
    sought = text.casefold()
    named = [(len(sought) / len(label.casefold()), feature) for feature, label in labels if sought in label.casefold()]
    best = sorted(named, key=lambda each: (-each[0], each[1]))[:top_k]
    return FoundFeatures(tuple(FoundFeature(feature, score) for score, feature in best))


def _described(decoder: Decoder, job: FeatureSearch, found: FoundFeatures) -> FoundFeatures:
    numbers = [each.feature for each in found.features]
    labels = job.labels.of(numbers) if job.labels is not None else [""] * len(numbers)
    promoted: list[tuple[PromotedToken, ...]] = [()] * len(numbers)
    if job.autoencoder.spec.output_site in _WRITE_TO_RESIDUAL:
        promoted = _promoted(decoder, job.autoencoder, numbers)
    features = tuple(
        FoundFeature(f.feature, f.score, f.target_mean, f.contrast_mean, f.rate, label, promotes)
        for f, label, promotes in zip(found.features, labels, promoted, strict=True)
    )
    return FoundFeatures(features, found.active_features, found.tokens, found.explained_variance, found.mean_active)


@torch.inference_mode()
def _promoted(decoder: Decoder, autoencoder: Autoencoder, numbers: list[int]) -> list[tuple[PromotedToken, ...]]:
    unembedding = Unembedding.of(decoder)
    found: list[tuple[PromotedToken, ...]] = []
    for start in range(0, len(numbers), _PROMOTED_AT_ONCE):
        rows = autoencoder.file.chosen("decoder", numbers[start : start + _PROMOTED_AT_ONCE]).float()
        products = unembedding.products(rows.to(unembedding.rows.device))
        values, ids, *_ = row_extremes(products, min(PROMOTED, products.shape[1]))
        found += [tuple(map(PromotedToken, *pair)) for pair in zip(ids.tolist(), values.tolist(), strict=True)]
    return found
