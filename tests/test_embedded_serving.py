"""The real model behind a real channel: 64 programs at once, what cancelling gives back, equality with transformers."""

import asyncio
from dataclasses import replace

import pytest
import torch
from kept_sites import KeepSite
from live import LiveServer
from transformers import AutoModelForCausalLM

from patchclamp import AsyncClient, Client
from patchclamp.async_streams import AsyncGenerateStream
from patchclamp.programs import Program, add
from patchclamp_server.analysis.documents import inputs_of, pools_for
from patchclamp_server.model.sites import NEURON_SITES, PREACTIVATION_SITES

STREAMS = 64
WIDTH = 576
# Tokens within which a cancelled stream must have left.
MOST_STEPS = 50
PROMPTS = ["The capital of France is", "Once upon a time there was", "Water boils at"]


def program(seed: int) -> Program:
    values = torch.randn(WIDTH, generator=torch.Generator().manual_seed(seed))
    return Program([add(values.tolist(), layers=[8 + seed % 16], strength=0.01 * seed, name=f"random {seed}")])


def streams(client: AsyncClient, max_tokens: int) -> list[AsyncGenerateStream]:
    return [
        client.generate(f"{seed} little words", program=program(seed), max_tokens=max_tokens, ignore_eos=True)
        for seed in range(STREAMS)
    ]


async def read_tokens(stream: AsyncGenerateStream, n: int) -> None:
    seen = 0
    async for chunk in stream:
        seen += len(chunk.tokens)
        if seen >= n:
            return
    raise AssertionError(f"the stream ended after {seen} tokens")


async def test_64_streams_with_64_programs_complete(embedded_server: LiveServer) -> None:
    async with AsyncClient(embedded_server.address) as client:
        results = await asyncio.gather(*(stream.result() for stream in streams(client, max_tokens=6)))
    assert all(len(result.tokens) == 6 for result in results)
    assert len({result.receipt.program_fingerprint for result in results}) == STREAMS
    assert all(result.receipt.touched for result in results)
    stats = embedded_server.server.engine.stats()
    assert stats.kv_blocks_free == stats.kv_blocks_total


async def test_cancelling_32_of_64_streams_returns_all_their_blocks(embedded_server: LiveServer) -> None:
    engine = embedded_server.server.engine
    async with AsyncClient(embedded_server.address) as client:
        running = streams(client, max_tokens=400)
        await asyncio.gather(*(read_tokens(stream, 1) for stream in running))
        held = engine.stats().kv_blocks_total - engine.stats().kv_blocks_free
        for stream in running[::2]:
            stream.close()
        # The others go on, and the cancelled ones leave in the meantime.
        for _ in range(MOST_STEPS):
            if engine.stats().running == STREAMS // 2:
                break
            await asyncio.gather(*(read_tokens(stream, 1) for stream in running[1::2]))
        stats = engine.stats()
        assert stats.running == STREAMS // 2
        assert stats.kv_blocks_total - stats.kv_blocks_free < held
        for stream in running[1::2]:
            stream.close()
        for _ in range(MOST_STEPS):
            if engine.stats().running == 0:
                break
            await client.generate("the end", max_tokens=1).result()
    stats = engine.stats()
    assert stats.running == 0
    assert stats.kv_blocks_free == stats.kv_blocks_total


@pytest.mark.parametrize("prompt", PROMPTS)
def test_greedy_text_equals_that_of_plain_transformers(
    embedded_server: LiveServer, plain_model: torch.nn.Module, prompt: str
) -> None:
    with Client(embedded_server.address) as client:
        result = client.generate(prompt, max_tokens=24, ignore_eos=True).result()
        ids = client.tokenize(prompt).ids
    with torch.no_grad():
        out = plain_model.generate(torch.tensor([list(ids)]), max_new_tokens=24, do_sample=False, eos_token_id=None)
    assert [token.id for token in result.tokens] == out[0, len(ids) :].tolist()


@pytest.fixture(scope="module")
def plain_model(embedded_dir: object) -> torch.nn.Module:
    return AutoModelForCausalLM.from_pretrained(embedded_dir, dtype=torch.float32)


def test_gates_and_ups_of_codes_make_the_neurons_that_are_served(embedded_server: LiveServer) -> None:
    """Products over codes give gate and up in one: taken apart, edited by nobody, they change no bit."""
    decoder, document = embedded_server.model.decoder, torch.arange(40, 46)[None]
    assert decoder.blocks[3].mlp_input.matrix is not None
    for n in (1, 6):
        step = inputs_of(document[:, :n], 0, n, decoder)
        apart = replace(step, visited_preactivations={(site, 3): True for site in PREACTIVATION_SITES})
        kept = {site: KeepSite(site) for site in NEURON_SITES}
        plain = decoder.forward(step, pools_for(decoder, document))
        for hooks in kept.values():
            assert torch.equal(decoder.forward(apart, pools_for(decoder, document), hooks), plain)
        gate, up, neurons = (kept[site].kept[3] for site in NEURON_SITES)
        torch.testing.assert_close(torch.nn.functional.silu(gate) * up, neurons, rtol=1e-5, atol=1e-6)
