"""Which neurons are dead, rare, always on, detectors of tokens or pairs of tokens, or positional: one pass over texts.

    census_counts.py      what is counted             census_controls.py    the same of neurons that fire at random
    census_classes.py     what the counts say         census_sets.py        sets, detectors and layers

Windows of the texts run as low-priority requests of the engine (analysis/corpora). A job that was interrupted goes on
from its last checkpoint when it is asked for again; thresholds of classes, tags and the description may differ then,
since they do not change what is counted.

Source: Voita, Ferrando and Nalmpantis 2023, Neurons in Large Language Models: Dead, N-gram, Positional.
"""

import asyncio
import time
from collections.abc import AsyncGenerator
from contextlib import aclosing
from dataclasses import asdict, dataclass

from patchclamp_server.analysis.corpora.checkpoint import CheckpointPolicy
from patchclamp_server.analysis.corpora.run import CorpusJob, CorpusProgress, run_corpus
from patchclamp_server.analysis.neurons.census_classes import NeuronClass, Rules
from patchclamp_server.analysis.neurons.census_counts import Counters
from patchclamp_server.analysis.neurons.census_sets import Classes, classes_of
from patchclamp_server.analysis.neurons.stored import StoredSet, store_neurons
from patchclamp_server.analysis.neurons.texts import TextSource
from patchclamp_server.artifacts.store import ArtifactStore
from patchclamp_server.artifacts.types import Tags
from patchclamp_server.engine.engine import Engine
from patchclamp_server.errors import InvalidArgument, NotFound
from patchclamp_server.model.info import ModelInfo
from patchclamp_server.model.sites import Site
from patchclamp_server.text.prompt import PromptEncoder

# A census may take hours: so often it says how far it is, besides at its start and its end.
SECONDS_PER_EVENT = 0.25


@dataclass(frozen=True, eq=False)
class Census:
    """A neuron of `layers` fires at a token where it is above `threshold` at `site`, or with `magnitude` where its size
    is. `ngram`: 1, tokens alone, or 2. `names`: the set of a class is tagged "<name>-<class>" with each."""

    texts: TextSource
    layers: tuple[int, ...]
    site: Site
    threshold: float
    magnitude: bool
    ngram: int
    bins: int
    rules: Rules
    checkpoint_tokens: int
    restart: bool = False
    description: str = ""
    names: tuple[str, ...] = ()
    replace_tags: bool = False

    def tags_of(self, of: NeuronClass) -> Tags:
        return class_tags(self.names, of, replace=self.replace_tags)


@dataclass(frozen=True)
class CensusProgress:
    """Tokens: `total` is an estimate, by the texts that are done, until the end, and 0 where it has no ground."""

    done: int
    total: int
    resumed: int


@dataclass(frozen=True, eq=False)
class CensusResult:
    """`texts`: that were seen to their end. `tokens_per_second`: of those that were not resumed."""

    tokens: int
    texts: int
    resumed_tokens: int
    tokens_per_second: float
    classes: Classes
    stored: dict[NeuronClass, StoredSet]
    warnings: tuple[str, ...]


def class_tags(names: tuple[str, ...], of: NeuronClass, *, replace: bool) -> Tags:
    return Tags(tuple(f"{name}-{of.value}" for name in names), replace)


async def census(
    engine: Engine, store: ArtifactStore, info: ModelInfo, encoder: PromptEncoder, job: Census
) -> AsyncGenerator[CensusProgress | CensusResult, None]:
    """Yields progress, then the result, whose sets are stored. Ending the iteration early ends the work, and leaves
    its checkpoint.

    Raises InvalidArgument on "texts" that have no token, and what `run_corpus` raises.
    """
    counters = Counters(
        job.layers,
        info,
        threshold=job.threshold,
        magnitude=job.magnitude,
        ngram=job.ngram,
        bins=job.bins,
        window_tokens=job.texts.window_tokens,
    )
    texts = job.texts
    work = CorpusJob(texts.corpus, counters.reductions(job.site), texts.window_tokens, texts.max_tokens)
    policy = CheckpointPolicy(every_tokens=job.checkpoint_tokens)
    checkpoint = await asyncio.to_thread(work.checkpoint, store.checkpoints(), engine, policy)
    if job.restart:
        await asyncio.to_thread(checkpoint.remove)
    begun, told, last = time.monotonic(), -SECONDS_PER_EVENT, None
    async with aclosing(run_corpus(engine, encoder, work, checkpoint)) as events:
        async for last in events:
            if (now := time.monotonic()) - told >= SECONDS_PER_EVENT:
                told = now
                yield _progress(last, texts.max_tokens)
    seconds = time.monotonic() - begun
    if last is None or not last.tokens:
        raise InvalidArgument("texts", "none of the texts has a token")
    yield CensusProgress(last.tokens, last.tokens, last.resumed_tokens)
    result = await asyncio.to_thread(_result, store, info, job, counters, last, seconds)
    await asyncio.to_thread(checkpoint.remove)
    yield result


def _progress(event: CorpusProgress, most_tokens: int) -> CensusProgress:
    total = event.tokens * event.total_documents // event.documents if event.documents else most_tokens
    total = min(total, most_tokens) if most_tokens else total
    return CensusProgress(event.tokens, max(total, event.tokens) if total else 0, event.resumed_tokens)


def _result(
    store: ArtifactStore, info: ModelInfo, job: Census, counters: Counters, last: CorpusProgress, seconds: float
) -> CensusResult:
    classes = classes_of(counters, job.rules)
    about = {
        "corpus": job.texts.corpus.digest,
        "window_tokens": job.texts.window_tokens,
        "layers": list(job.layers),
        "site": job.site.value,
        "threshold": job.threshold,
        "magnitude": job.magnitude,
        "ngram": job.ngram,
        "position_bins": job.bins,
        **asdict(job.rules),
    }
    stored = {
        each: store_neurons(
            store,
            info,
            found,
            provenance={"method": "census", "class": each.value, "parameters": about},
            evidence={"tokens": last.tokens, "texts": last.documents, **evidence},
            description=job.description,
            tags=job.tags_of(each),
        )
        for each, (found, evidence) in classes.sets.items()
    }
    warnings = [last.refused] if last.refused else []
    warnings += [warning for each in NeuronClass if each not in stored for warning in _stale(store, job.tags_of(each))]
    fresh = last.tokens - last.resumed_tokens
    rate = fresh / max(seconds, 1e-9)
    return CensusResult(last.tokens, last.documents, last.resumed_tokens, rate, classes, stored, tuple(warnings))


def _stale(store: ArtifactStore, tags: Tags) -> list[str]:
    """Returns what to say of the tags of a class that has no neuron now."""
    found = []
    for name in tags.names:
        try:
            held = store.resolve(name)
        except NotFound:
            continue
        found.append(f"no neuron is of this class; the tag {name!r} still names {held}")
    return found
