"""The contexts in which neurons are largest, against a direct pass over every window."""

from collections.abc import Iterator
from contextlib import aclosing

import pytest
import torch
from corpus_runs import WINDOW, corpus, states, word_encoder
from engine_runs import loaded, started

from patchclamp_server.analysis.corpora.windows import Window, windows
from patchclamp_server.analysis.neurons.contexts import NeuronContext, Recorded, Recording, contexts_of, record
from patchclamp_server.analysis.neurons.texts import TextSource
from patchclamp_server.analysis.progress import Progress
from patchclamp_server.artifacts.neuron_sets import Neuron
from patchclamp_server.engine.config import EngineConfig
from patchclamp_server.engine.engine import Engine
from patchclamp_server.errors import InvalidArgument
from patchclamp_server.model.sites import Site

# A window of 8 tokens comes in several steps.
CONFIG = EngineConfig(max_tokens_per_step=5, kv_block_size=4, kv_cache_tokens=512)
LENGTHS = (3, 20, 7, 1, 30, 15, 9)
NEURONS = (Neuron(2, 7), Neuron(0, 3), Neuron(2, 1))
AROUND = 2


@pytest.fixture(scope="module")
def engine() -> Iterator[Engine]:
    with started(loaded("llama"), CONFIG) as engine:
        yield engine


def recording(lengths: tuple[int, ...] = LENGTHS, contexts: int = 4) -> Recording:
    source = TextSource(corpus(*lengths), WINDOW)
    return Recording(source, Site.MLP_POST, NEURONS, contexts, (Neuron(0, 5), Neuron(0, 9)))


async def recorded(engine: Engine, job: Recording) -> Recorded:
    async with aclosing(record(engine, word_encoder(), job)) as events:
        (found,) = [event async for event in events if not isinstance(event, Progress)]
    return found


async def contexts(engine: Engine, job: Recording, found: Recorded) -> dict[Neuron, tuple[NeuronContext, ...]]:
    async with aclosing(contexts_of(engine, word_encoder(), job, found, AROUND)) as events:
        (them,) = [event async for event in events if not isinstance(event, Progress)]
    return them


async def every_window(job: Recording) -> list[Window]:
    return [window async for window in windows(job.source.corpus, word_encoder(), WINDOW)]


async def test_rate_mean_and_max_are_those_of_every_token_but_the_first_of_a_window(engine: Engine) -> None:
    job = recording()
    found = await recorded(engine, job)
    every = await every_window(job)
    for neuron in NEURONS:
        rows = torch.cat([states(window.tokens, Site.MLP_POST, neuron.layer)[1:] for window in every])
        column = rows[:, neuron.neuron].double()
        own = found.activities[neuron]
        assert own.tokens == len(column)
        assert own.rate == pytest.approx(float((column > 0).double().mean()))
        assert own.mean == pytest.approx(float(column.mean()), abs=1e-6)
        assert own.max == pytest.approx(float(column.max()), abs=1e-6)
    rows = torch.cat([states(window.tokens, Site.MLP_POST, 0)[1:] for window in every])
    assert found.largest == {n: pytest.approx(float(rows[:, n.neuron].max()), abs=1e-6) for n in job.others}


async def test_contexts_are_the_windows_with_the_largest_values_each_with_its_largest_token(engine: Engine) -> None:
    job = recording()
    them = await contexts(engine, job, await recorded(engine, job))
    every = await every_window(job)
    for neuron in NEURONS:
        columns = [states(window.tokens, Site.MLP_POST, neuron.layer)[:, neuron.neuron] for window in every]
        ranked = sorted(range(len(every)), key=lambda i: -float(columns[i][1:].max()))[:4]
        assert len(them[neuron]) == 4
        for context, i in zip(them[neuron], ranked, strict=True):
            window, at = every[i], 1 + int(columns[i][1:].argmax())
            assert (context.document, context.position) == (window.document, window.start + at - 1)
            first, end = max(1, at - AROUND), at + AROUND + 1
            assert context.ids == window.tokens[first:end]
            torch.testing.assert_close(context.values, columns[i][first:end], rtol=1e-5, atol=1e-6)
            assert context.value == float(context.values.max())


async def test_there_are_no_more_contexts_than_windows(engine: Engine) -> None:
    job = recording((3, 7))
    them = await contexts(engine, job, await recorded(engine, job))
    assert {len(own) for own in them.values()} == {2}


async def test_texts_without_a_token_that_counts_are_refused(engine: Engine) -> None:
    from patchclamp_server.analysis.corpora.windows import ListedCorpus
    from patchclamp_server.artifacts.corpora import Document

    empty = TextSource(ListedCorpus([Document(())]), WINDOW)
    with pytest.raises(InvalidArgument) as caught:
        await recorded(engine, Recording(empty, Site.MLP_POST, NEURONS, 2))
    assert caught.value.field == "texts"
