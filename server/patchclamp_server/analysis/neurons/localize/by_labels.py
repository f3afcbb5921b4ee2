"""Neurons of single labels by the entropy of their activation probabilities, counted by a reducer for each label.

Documents of every label are dealt out at random: the share that is held out is counted apart, under labels of its own.
"""

import asyncio
from collections.abc import AsyncGenerator
from contextlib import aclosing
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from patchclamp_server.analysis.corpora.run import CorpusJob, run_corpus
from patchclamp_server.analysis.corpora.windows import Corpus
from patchclamp_server.analysis.neurons.localize.activation_entropy import entropies
from patchclamp_server.analysis.neurons.localize.holdout import Relabelled, held_out
from patchclamp_server.analysis.neurons.localize.methods import ActivationEntropy, Localization, Scored
from patchclamp_server.analysis.progress import Progress
from patchclamp_server.artifacts.corpora import UNLABELLED
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
    labels = method.texts.corpus.labels
    corpus = await asyncio.to_thread(split, method.texts.corpus, job.holdout_fraction, job.seed, field)
    firing = PerLabel(job.layers, 2 * len(labels), partial(Firing, job.layers, method.threshold))
    moments = PerLabel(job.layers, 2 * len(labels), partial(Moments, job.layers))
    reductions = (Reduction(job.site, firing), Reduction(Site.MLP_POST, moments))
    corpus_job = CorpusJob(corpus, reductions, method.texts.window_tokens, method.texts.max_tokens)
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


def split(corpus: Corpus, fraction: float, seed: int, field: str) -> Relabelled:
    """Returns the corpus with the held-out documents of label k under the label k + the number of labels.

    Raises InvalidArgument on `field` where a label has fewer than two documents.
    """
    labels = corpus.document_labels
    counts = np.bincount(labels[labels != UNLABELLED], minlength=len(corpus.labels))
    few = np.flatnonzero(counts < 2)
    if len(few):
        message = f"{corpus.labels[few[0]]!r:.80} has {counts[few[0]]} texts; expected two or more of each label"
        raise InvalidArgument(field, message)
    if len(counts) < 2:
        raise InvalidArgument(field, f"expected texts of two labels or more, got {len(counts)}")
    shift = np.where(held_out(labels, fraction, seed), len(counts), 0)
    return Relabelled(corpus, labels + shift, (*corpus.labels, *(f"{name}, held out" for name in corpus.labels)))
