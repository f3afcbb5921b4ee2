"""Neurons of single labels by the entropy of their activation probabilities, counted by a reducer for each label.

Documents of every label are dealt out at random: the share that is held out is counted apart, under labels of its own.
"""

import random
from collections import defaultdict
from collections.abc import AsyncGenerator
from contextlib import aclosing
from functools import partial
from typing import Any

import torch
from torch import Tensor

from patchclamp_server.analysis.corpora.run import CorpusJob, run_corpus
from patchclamp_server.analysis.corpora.windows import Corpus
from patchclamp_server.analysis.digests import json_digest
from patchclamp_server.analysis.neurons.localize.activation_entropy import entropies
from patchclamp_server.analysis.neurons.localize.methods import ActivationEntropy, Localization, Scored
from patchclamp_server.analysis.progress import Progress
from patchclamp_server.artifacts.corpora import UNLABELLED, Document
from patchclamp_server.engine.engine import Engine
from patchclamp_server.engine.reducers.firing import Firing
from patchclamp_server.engine.reducers.moments import Moments
from patchclamp_server.engine.reducers.per_label import PerLabel
from patchclamp_server.engine.request import Reduction
from patchclamp_server.errors import InvalidArgument
from patchclamp_server.model.sites import Site
from patchclamp_server.text.prompt import PromptEncoder

MEASURE = "share of tokens active, the target's - the mean of the others"


async def by_entropy(
    engine: Engine, prompts: PromptEncoder, method: ActivationEntropy, job: Localization
) -> AsyncGenerator[Progress | tuple[list[Scored], dict[str, Any]], None]:
    """Yields progress in documents, then scores for every target and the fields of Localized beside the sets."""
    field = "activation_entropy.texts"
    split = SplitCorpus(method.texts.corpus, job.holdout_fraction, job.seed, field)
    labels = split.labels
    firing = PerLabel(job.layers, 2 * len(labels), partial(Firing, job.layers, method.threshold))
    moments = PerLabel(job.layers, 2 * len(labels), partial(Moments, job.layers))
    reductions = (Reduction(job.site, firing), Reduction(Site.MLP_POST, moments))
    corpus_job = CorpusJob(split, reductions, method.texts.window_tokens, method.texts.max_tokens)
    tokens = windows = 0
    async with aclosing(run_corpus(engine, prompts, corpus_job)) as progress:
        async for event in progress:
            tokens, windows = event.tokens, event.windows
            yield Progress("documents", event.documents, event.total_documents)

    def rates(label: int) -> Tensor:
        own = firing.of[label]
        if any(not own.count(layer) for layer in job.layers):
            raise InvalidArgument(field, f"no tokens of {labels[label % len(labels)]!r:.80} were run; raise max_tokens")
        return torch.stack([own.rates(layer) for layer in job.layers])

    found, heldout = (torch.stack([rates(label + shift) for label in range(len(labels))]) for shift in (0, len(labels)))
    units = found[0].numel()
    size = job.size or max(1, units // 100)
    told = entropies(found.flatten(1), activity=method.activity, count=size)
    sets = []
    for label in method.targets or range(len(labels)):
        others = [other for other in range(len(labels)) if other != label]
        measured = heldout[label] - heldout[others].mean(0)
        values = torch.stack([moments.of[label].mean(layer) for layer in job.layers])
        scores = told.scores(label).view(found[0].shape)
        sets.append(Scored(labels[label], scores, MEASURE, measured.float(), size, values.float()))
    yield sets, {"texts": windows, "tokens": tokens}


class SplitCorpus:
    """A corpus whose held-out documents have the labels from `len(labels)` on; documents without a label keep none."""

    def __init__(self, corpus: Corpus, fraction: float, seed: int, field: str) -> None:
        self._corpus, self.labels = corpus, corpus.labels
        by_label: dict[int, list[int]] = defaultdict(list)
        for index in range(len(corpus)):
            label = corpus.document(index).label
            if label != UNLABELLED:
                by_label[label].append(index)
        if len(by_label) < 2 or len(by_label) < len(corpus.labels):
            message = f"expected texts of two labels or more, and of each, got {len(by_label)} labels"
            raise InvalidArgument(field, message)
        self._heldout: set[int] = set()
        generator = random.Random(seed)
        for label, indices in sorted(by_label.items()):
            if len(indices) < 2:
                name = corpus.labels[label]
                raise InvalidArgument(field, f"{name!r:.80} has one text; expected two, one of them held out")
            n = min(max(1, round(fraction * len(indices))), len(indices) - 1)
            self._heldout.update(generator.sample(indices, n))
        self.digest = json_digest([corpus.digest, fraction, seed])

    def __len__(self) -> int:
        return len(self._corpus)

    def document(self, index: int) -> Document:
        found = self._corpus.document(index)
        return Document(found.text, found.label + len(self.labels)) if index in self._heldout else found
