"""Jobs over a corpus: what reducers have in the end, progress, checkpoints, and what is left in the engine."""

import asyncio
import logging
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import aclosing
from pathlib import Path

import pytest
import torch
from corpus_runs import LAYERS, WINDOW, Asked, assert_equal, corpus, documents, states, word_encoder
from engine_runs import Job, Outcome, loaded, run_alone, started
from patience import PATIENCE_SECONDS

from patchclamp_server.analysis.corpora.checkpoint import CheckpointPolicy
from patchclamp_server.analysis.corpora.run import CorpusJob, CorpusProgress, run_corpus
from patchclamp_server.analysis.corpora.windows import ListedCorpus, window_at, windows
from patchclamp_server.artifacts.checkpoints import Checkpoints
from patchclamp_server.artifacts.corpora import Document
from patchclamp_server.artifacts.store import ArtifactStore
from patchclamp_server.engine.access import OpenEngine
from patchclamp_server.engine.config import EngineConfig
from patchclamp_server.engine.engine import Engine
from patchclamp_server.engine.request import Request, StopParams
from patchclamp_server.errors import InvalidArgument, ResourceExhausted
from patchclamp_server.model.sites import Site

LENGTHS = (3, 20, 7, 1, 30, 15, 9)
CONFIG = EngineConfig(max_tokens_per_step=20, kv_block_size=4, kv_cache_tokens=512)
OFTEN = CheckpointPolicy(every_tokens=30, every_seconds=1e9)


@pytest.fixture
def engine() -> Iterator[Engine]:
    with started(loaded("llama"), CONFIG) as engine:
        yield engine


@pytest.fixture
def checkpoints(tmp_path: Path) -> Checkpoints:
    return ArtifactStore(tmp_path).checkpoints()


async def run(
    engine: Engine, job: CorpusJob, checkpoints: Checkpoints | None = None, until: int | None = None
) -> list[CorpusProgress]:
    """`until`: leaves once so many tokens are done."""
    checkpoint = None if checkpoints is None else job.checkpoint(checkpoints, engine, OFTEN)
    found = []
    async with aclosing(run_corpus(engine, word_encoder(), job, checkpoint)) as events:
        async for event in events:
            found.append(event)
            if until is not None and event.tokens >= until:
                break
    return found


async def idle(engine: Engine) -> None:
    """Returns when nothing is with the engine."""
    async with asyncio.timeout(PATIENCE_SECONDS):
        while (stats := engine.stats()).running or stats.waiting:
            await asyncio.sleep(0.01)


async def test_reducers_have_what_a_naive_pass_finds(engine: Engine) -> None:
    asked, of = Asked(), corpus(*LENGTHS)
    await run(engine, asked.job(of))
    every = [window async for window in windows(of, word_encoder(), WINDOW)]
    rows = torch.cat([states(window.tokens, Site.MLP_POST, 2) for window in every])
    assert torch.equal(asked.firing.counts(2), (rows > 0).sum(0))
    stream = torch.cat([states(window.tokens, Site.RESID_POST, 1) for window in every]).double()
    torch.testing.assert_close(asked.moments.mean(1), stream.mean(0), rtol=1e-5, atol=1e-7)
    largest = asked.largest.largest(2)
    torch.testing.assert_close(largest.values, rows.T.topk(3).values, rtol=1e-5, atol=1e-7)
    assert asked.occurrences.total == len(rows)


async def test_a_place_of_a_large_value_leads_back_to_its_text(engine: Engine) -> None:
    asked, of = Asked(), corpus(*LENGTHS)
    await run(engine, asked.job(of))
    found = asked.largest.largest(0)
    for unit in range(4):
        window = await window_at(of, word_encoder(), WINDOW, int(found.texts[unit, 0]))
        value = states(window.tokens, Site.MLP_POST, 0)[int(found.positions[unit, 0]), unit]
        torch.testing.assert_close(value, found.values[unit, 0], rtol=1e-5, atol=1e-7)


async def test_progress_counts_windows_tokens_and_documents(engine: Engine) -> None:
    of = corpus(*LENGTHS)
    found = await run(engine, Asked().job(of))
    every = [window async for window in windows(of, word_encoder(), WINDOW)]
    assert [event.windows for event in found] == list(range(len(every) + 1))
    assert [event.tokens for event in found] == [sum(len(w.tokens) for w in every[:n]) for n in range(len(every) + 1)]
    assert (found[-1].documents, found[-1].total_documents) == (len(LENGTHS), len(LENGTHS))
    assert all(event.documents == every[event.windows].document for event in found[:-1])


async def test_a_job_ends_with_the_window_that_has_the_most_tokens(engine: Engine) -> None:
    asked = Asked()
    found = await run(engine, asked.job(corpus(*LENGTHS), most_tokens=20))
    assert 20 <= found[-1].tokens < 20 + WINDOW
    assert asked.firing.count(0) == found[-1].tokens


@pytest.mark.parametrize("until", [1, 50, 75])
async def test_a_job_that_was_left_goes_on_from_its_checkpoint(
    engine: Engine, checkpoints: Checkpoints, until: int
) -> None:
    whole, left, again = Asked(), Asked(), Asked()
    await run(engine, whole.job(corpus(*LENGTHS)))
    before = await run(engine, left.job(corpus(*LENGTHS)), checkpoints, until)
    await idle(engine)
    after = await run(engine, again.job(corpus(*LENGTHS)), checkpoints)
    assert after[0].resumed_tokens == after[0].tokens == before[-1].kept_tokens
    assert before[-1].tokens - before[-1].kept_tokens <= OFTEN.every_tokens + WINDOW
    assert_equal(again, whole)


async def test_a_job_that_ended_without_storing_its_result_need_not_run_again(
    engine: Engine, checkpoints: Checkpoints
) -> None:
    first, again = Asked(), Asked()
    ended = await run(engine, first.job(corpus(*LENGTHS)), checkpoints)
    steps = engine.stats().steps
    after = await run(engine, again.job(corpus(*LENGTHS)), checkpoints)
    assert after[-1].resumed_tokens == ended[-1].tokens
    assert engine.stats().steps == steps
    assert_equal(again, first)
    job = again.job(corpus(*LENGTHS))
    job.checkpoint(checkpoints, engine).remove()
    assert checkpoints.keys() == []


def flipped(data: bytes) -> bytes:
    return data[:-1] + bytes([data[-1] ^ 1])


@pytest.mark.parametrize("damage", [flipped, lambda data: data[:100], lambda data: b""])
async def test_a_damaged_checkpoint_is_refused_and_said_to_be(
    engine: Engine,
    checkpoints: Checkpoints,
    tmp_path: Path,
    damage: Callable[[bytes], bytes],
    caplog: pytest.LogCaptureFixture,
) -> None:
    whole, left, again = Asked(), Asked(), Asked()
    await run(engine, whole.job(corpus(*LENGTHS)))
    await run(engine, left.job(corpus(*LENGTHS)), checkpoints, 70)
    (file,) = (tmp_path / "checkpoints").iterdir()
    file.write_bytes(damage(file.read_bytes()))
    with caplog.at_level(logging.ERROR):
        after = await run(engine, again.job(corpus(*LENGTHS)), checkpoints)
    assert after[0].tokens == after[-1].resumed_tokens == 0
    assert "damaged" in after[-1].refused
    assert file.name in caplog.text
    assert_equal(again, whole)


async def test_a_checkpoint_of_other_reducers_leaves_none_of_them_half_restored(
    engine: Engine, checkpoints: Checkpoints
) -> None:
    whole, left, again = Asked(), Asked(), Asked()
    await run(engine, whole.job(corpus(*LENGTHS)))
    job = left.job(corpus(*LENGTHS))
    await run(engine, job, checkpoints, 70)
    key = job.checkpoint(checkpoints, engine).key
    saved = checkpoints.load(key)
    assert saved is not None
    checkpoints.save(key, {**saved.tensors, "3.other": torch.zeros(1)}, saved.about)
    after = await run(engine, again.job(corpus(*LENGTHS)), checkpoints)
    assert "other" in after[0].refused
    assert_equal(again, whole)


async def test_only_the_same_job_has_the_key_of_a_checkpoint(engine: Engine, checkpoints: Checkpoints) -> None:
    def key(job: CorpusJob) -> str:
        return job.checkpoint(checkpoints, engine).key

    of = corpus(*LENGTHS)
    keys = [
        key(Asked().job(of)),
        key(Asked().job(corpus(*LENGTHS[:-1]))),
        key(Asked().job(of, window_tokens=9)),
        key(Asked().job(of, most_tokens=20)),
        key(CorpusJob(of, Asked().job(of).reductions, WINDOW, parameters={"edges": [1]})),
        key(CorpusJob(of, Asked().job(of).reductions[:2], WINDOW)),
    ]
    assert len(set(keys)) == len(keys)
    assert key(Asked().job(corpus(*LENGTHS))) == keys[0]


@pytest.mark.parametrize("cancelled", [False, True])
async def test_a_job_that_ends_early_leaves_nothing_in_the_engine(engine: Engine, cancelled: bool) -> None:
    job = Asked().job(corpus(*[40] * 50))
    if cancelled:
        begun = asyncio.Event()

        async def follow() -> None:
            async for event in run_corpus(engine, word_encoder(), job):
                if event.windows:
                    begun.set()

        task = asyncio.create_task(follow())
        await begun.wait()
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
    else:
        await run(engine, job, until=10)
    await idle(engine)
    assert engine.stats().kv_blocks_free + engine.stats().kv_blocks_cached >= engine.stats().kv_blocks_total - 1


async def test_a_window_that_cannot_run_ends_the_job(engine: Engine) -> None:
    long = loaded("llama").info.context_length + 1
    with pytest.raises(InvalidArgument) as refused:
        await run(engine, Asked().job(corpus(long + 5), window_tokens=long))
    assert refused.value.field == "window_tokens"


async def test_memory_does_not_grow_with_the_corpus(engine: Engine) -> None:
    """Bytes of reducers, and documents that are read ahead of those that are done."""

    class Counted(ListedCorpus):
        read = 0

        def document(self, index: int) -> Document:
            self.read = index
            return super().document(index)

    kept = []
    for n in (5, 100):
        asked, of = Asked(), Counted(documents(*[WINDOW - 1] * n), ("even", "odd"))
        async for event in run_corpus(engine, word_encoder(), asked.job(of)):
            assert of.read - event.documents <= STEPS
        kept.append(asked.firing.kept_bytes + asked.moments.kept_bytes + asked.largest.kept_bytes)
    assert kept[0] == kept[1]
    width = loaded("llama").info.d_ff
    assert asked.firing.kept_bytes == len(LAYERS) * (8 * width + 8)


# Windows in flight, and the one that is made next.
STEPS = 4 * CONFIG.max_tokens_per_step // WINDOW + 1


async def test_where_serving_leaves_no_room_a_job_waits(engine: Engine) -> None:
    class Full(OpenEngine):
        refused = 0

        def admit(self, request: Request) -> Request:
            if self.refused < 2:
                self.refused += 1
                raise ResourceExhausted("", "the queue is full", 0.001)
            return request

    engine.access = full = Full()
    found = await run(engine, Asked().job(corpus(*LENGTHS)))
    assert (full.refused, found[-1].documents) == (2, len(LENGTHS))


async def test_a_stream_beside_a_job_keeps_its_bits(engine: Engine) -> None:
    stream = Job((5, 6, 7, 8, 9), max_tokens=12)
    alone = run_alone("llama", stream, CONFIG)
    beside, logits = Outcome(), list[torch.Tensor]()
    engine.on_logits = lambda _, __, row: logits.append(row.clone())
    asked, whole = Asked(), Asked()
    events: AsyncIterator[CorpusProgress] = run_corpus(engine, word_encoder(), asked.job(corpus(*LENGTHS)))
    for _ in range(3):
        await anext(events)
    engine.submit(Request(stream.prompt, beside.on_event, stop=StopParams(max_tokens=12, ignore_eos=True)))
    async for _ in events:
        pass
    await asyncio.to_thread(beside.done.wait, PATIENCE_SECONDS)
    assert beside.tokens == alone.tokens
    assert torch.equal(torch.stack(logits), torch.stack(alone.logits))
    await run(engine, whole.job(corpus(*LENGTHS)))
    assert_equal(asked, whole)


async def test_prefixes_of_serving_stay_known_beside_a_job_longer_than_the_cache(engine: Engine) -> None:
    prompt = tuple(range(5, 30))

    async def cached_tokens() -> int:
        outcome = Outcome()
        engine.submit(Request(prompt, outcome.on_event, stop=StopParams(max_tokens=1, ignore_eos=True)))
        await asyncio.to_thread(outcome.done.wait, PATIENCE_SECONDS)
        return outcome.end().usage.cached_prompt_tokens

    assert await cached_tokens() == 0
    found = await run(engine, Asked().job(corpus(*[40] * 20)))
    assert found[-1].tokens > CONFIG.kv_cache_tokens
    assert await cached_tokens() == 24
