"""Activations collected through the engine: what they are, how many are in flight, and what an early end leaves."""

import asyncio
from collections.abc import Sequence
from contextlib import aclosing
from pathlib import Path

import pytest
import torch
from steering_fixtures import Recorded, plain_states

from patchclamp_server.analysis.activations import collect
from patchclamp_server.engine.config import EngineConfig
from patchclamp_server.engine.engine import Engine
from patchclamp_server.engine.request import Capture, Captured, Event, Priority, Request, StopParams
from patchclamp_server.errors import InvalidArgument
from patchclamp_server.interventions.pooling import Pooling
from patchclamp_server.model.info import ModelInfo
from patchclamp_server.model.load import LoadedModel
from patchclamp_server.model.sites import Site

# Shorter and longer than a KV block, longer than a step, with a prefix in common, and one twice.
LENGTHS = (1, 2, 5, 16, 17, 33, 70, 5)
SITES = (Site.RESID_PRE, Site.RESID_POST)


def prompts_of(info: ModelInfo, lengths: Sequence[int] = LENGTHS) -> list[tuple[int, ...]]:
    ids = torch.randint(3, info.vocab_size, (max(lengths),), generator=torch.Generator().manual_seed(0)).tolist()
    return [tuple(ids[:length]) for length in lengths]


async def gathered(recorded: Recorded, prompts: list[tuple[int, ...]], capture: Capture) -> list[torch.Tensor]:
    async with aclosing(collect(recorded.engine, prompts, capture)) as pooled:
        by_index = {index: each.values async for index, each in pooled}
    return [by_index[index] for index in range(len(prompts))]


@pytest.mark.parametrize("site", SITES)
@pytest.mark.parametrize("pooling", Pooling)
async def test_they_equal_the_pooled_hidden_states_of_plain_transformers(
    recorded: Recorded, tiny_llama: LoadedModel, tiny_llama_dir: Path, site: Site, pooling: Pooling
) -> None:
    prompts = prompts_of(tiny_llama.info)
    capture = Capture(site, tuple(range(tiny_llama.info.n_layers)), pooling)
    # The second round meets the prefixes that the first one left in the cache.
    for _ in range(2):
        for prompt, found in zip(prompts, await gathered(recorded, prompts, capture), strict=True):
            hidden = plain_states(tiny_llama_dir, prompt, site)
            # Mean and maximum leave out the first token, unless there is no other.
            others = hidden[:, 1:] if len(prompt) > 1 else hidden
            expected = {
                Pooling.LAST_TOKEN: hidden[:, -1],
                Pooling.MEAN: others.mean(dim=1),
                Pooling.MAX: others.amax(dim=1),
            }[pooling]
            torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


async def test_only_the_layers_asked_for_come_back(recorded: Recorded, tiny_llama: LoadedModel) -> None:
    prompts = prompts_of(tiny_llama.info)
    both = await gathered(recorded, prompts, Capture(Site.RESID_POST, (0, 1), Pooling.MEAN))
    second = await gathered(recorded, prompts, Capture(Site.RESID_POST, (1,), Pooling.MEAN))
    for all_layers, one in zip(both, second, strict=True):
        torch.testing.assert_close(one[0], all_layers[1], rtol=1e-4, atol=1e-5)


async def test_no_more_requests_are_in_flight_than_allowed(recorded: Recorded, tiny_llama: LoadedModel) -> None:
    prompts = prompts_of(tiny_llama.info, [20] * 12)
    capture = Capture(Site.RESID_POST, (0,), Pooling.LAST_TOKEN)
    seen = 0
    async with aclosing(collect(recorded.engine, prompts, capture, max_in_flight=3)) as pooled:
        async for _ in pooled:
            seen += 1
            stats = recorded.engine.stats()
            assert stats.running + stats.waiting <= 3
    assert seen == 12


async def test_an_early_end_cancels_what_is_in_flight(recorded: Recorded, tiny_llama: LoadedModel) -> None:
    prompts = prompts_of(tiny_llama.info, [200] * 40)
    capture = Capture(Site.RESID_POST, (0,), Pooling.LAST_TOKEN)
    async with aclosing(collect(recorded.engine, prompts, capture, max_in_flight=40)) as pooled:
        await anext(pooled)
    await drained(recorded)
    assert len(recorded.outcomes.ended) == 40
    assert recorded.outcomes.ended.count("cancelled") > 20


async def test_cancelling_the_task_cancels_what_is_in_flight(recorded: Recorded, tiny_llama: LoadedModel) -> None:
    prompts = prompts_of(tiny_llama.info, [200] * 40)
    task = asyncio.create_task(gathered(recorded, prompts, Capture(Site.RESID_POST, (0,), Pooling.LAST_TOKEN)))
    while recorded.engine.stats().steps == 0:
        await asyncio.sleep(0)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    await drained(recorded)
    assert recorded.outcomes.ended.count("cancelled") > 20


async def test_a_refused_prompt_raises_and_leaves_nothing_behind(recorded: Recorded, tiny_llama: LoadedModel) -> None:
    short = prompts_of(tiny_llama.info, [100] * 10)
    too_long = tuple([5] * (tiny_llama.info.context_length + 1))
    with pytest.raises(InvalidArgument):
        await gathered(recorded, [*short, too_long], Capture(Site.RESID_POST, (0,), Pooling.MEAN))
    await drained(recorded)
    assert "cancelled" in recorded.outcomes.ended


async def drained(recorded: Recorded) -> None:
    """Nothing runs any more, and every KV block can be taken again."""
    assert await asyncio.to_thread(recorded.engine.drain, 60.0)
    # Joins the engine's thread: the last outcome is recorded after the last request has left.
    await asyncio.to_thread(recorded.engine.shutdown)
    stats = recorded.engine.stats()
    assert stats.kv_blocks_free == stats.kv_blocks_total


def test_a_prompt_that_is_computed_again_after_a_preemption_is_pooled_once(tiny_llama: LoadedModel) -> None:
    """An interactive request takes the KV cache while an analysis goes on."""
    prompt = prompts_of(tiny_llama.info, [40])[0]
    pooled = []
    for rival in (False, True):
        engine = Engine(tiny_llama, EngineConfig(kv_cache_tokens=96))
        events: list[Event] = []
        capture = Capture(Site.RESID_POST, (0, 1), Pooling.MEAN)
        stop = StopParams(max_tokens=40, ignore_eos=True)
        engine.submit(Request(prompt, events.append, stop=stop, priority=Priority.ANALYSIS, capture=capture))
        while not events:
            engine.step()
        if rival:
            engine.submit(Request(prompt[::-1], lambda event: None, stop=stop))
        while engine.step():
            pass
        pooled += [event.pooled.values for event in events if isinstance(event, Captured)]
        assert bool(engine.stats().preemptions) is rival
    torch.testing.assert_close(pooled[1], pooled[0], rtol=1e-4, atol=1e-5)
