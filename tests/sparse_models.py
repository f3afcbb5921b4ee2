"""Tiny models as policies see them, with profiles of every policy that has one."""

import asyncio
from collections.abc import AsyncGenerator, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from typing import TypeVar

import torch
from engine_runs import loaded, started
from tiny_models import VOCAB
from torch import Tensor

from patchclamp_server.analysis.documents import inputs_of, pools_for
from patchclamp_server.analysis.sparsity.calibrate import CALIBRATIONS, calibrate_on
from patchclamp_server.analysis.sparsity.evaluate import Quality, Scored, scored
from patchclamp_server.engine.config import EngineConfig
from patchclamp_server.engine.engine import Engine
from patchclamp_server.model.decoder import NoHooks
from patchclamp_server.sparsity.apply import Forced, Rows, Step
from patchclamp_server.sparsity.blocks import sparse_blocks
from patchclamp_server.sparsity.mlp import SparseModel
from patchclamp_server.sparsity.policies import POLICIES
from patchclamp_server.sparsity.policies.teal import Teal
from patchclamp_server.sparsity.policy import Policy, Selector, SequenceState
from patchclamp_server.sparsity.products import CompactBudget, GatheredMlp, SparseProducts
from patchclamp_server.sparsity.profile import Profile

# Every policy that can be bound without saying more.
NAMES = tuple(POLICIES)


@cache
def sparse_model(family: str = "llama") -> SparseModel:
    """What engines on the tiny model have too."""
    return SparseModel(loaded(family).info.fingerprint, loaded(family).decoder)


def documents(n: int, tokens: int, seed: int = 0) -> Tensor:
    return torch.randint(3, VOCAB, (n, tokens), generator=torch.Generator().manual_seed(seed))


@cache
def profile(name: str, family: str = "llama") -> Profile | None:
    if name not in CALIBRATIONS:
        return None
    policy = Teal(allocation="greedy") if name == "teal" else POLICIES[name]()
    return calibrated(policy, documents(4, 32, seed=7), family)


E = TypeVar("E")


def events_of(
    job: Callable[[Engine], AsyncGenerator[E, None]], family: str = "llama", config: EngineConfig | None = None
) -> list[E]:
    """All events of a job on an engine of its own, whether a loop runs in this thread or not."""

    async def run() -> list[E]:
        with started(loaded(family), config or EngineConfig(kv_cache_tokens=4096)) as engine:
            return [event async for event in job(engine)]

    with ThreadPoolExecutor(1) as thread:
        return thread.submit(asyncio.run, run()).result()


def calibrated(policy: Policy, texts: Tensor, family: str = "llama") -> Profile:
    found = events_of(lambda engine: calibrate_on(engine, policy, texts), family)[-1]
    assert isinstance(found, Profile)
    return found


def evaluated(
    texts: Tensor, prompt: int, *selectors: Selector, family: str = "llama", config: EngineConfig | None = None
) -> list[Quality]:
    """The quality of each selector."""
    by_selector: dict[int, list[Scored]] = {}
    for index, document in events_of(lambda engine: scored(engine, texts, prompt, selectors), family, config):
        by_selector.setdefault(index, []).append(document)
    return [Quality.of(by_selector[index], selector) for index, selector in enumerate(selectors)]


def bound(policy: Policy, family: str = "llama") -> Selector:
    # CATS without a profile keeps an exact number for each row.
    wanted = None if policy.name == "cats" else profile(policy.name, family)
    return policy.bind(sparse_model(family), wanted)


def rows_of(x: Tensor, per_document: int) -> list[Tensor]:
    return list(torch.split(x, per_document))


def run(
    model: SparseModel,
    tokens: Tensor,
    prompt: int,
    selectors: list[Selector],
    forced: Forced | None = None,
    products: Sequence[SparseProducts] | None = None,
) -> tuple[list[Tensor], list[SequenceState]]:
    """Residual states [tokens - prompt, d] of every document after its prompt, each by its own selector."""
    states = [selector.begin() for selector in selectors]
    step = Step()
    decoder, blocks = model.decoder, sparse_blocks(model, step, products)
    pools = pools_for(decoder, tokens)
    for start, end in ((0, prompt), (prompt, tokens.shape[1])):
        n = end - start
        step.rows = [
            Rows(slice(i * n, (i + 1) * n), selector, state, prompt=start == 0, forced=forced or {})
            for i, (selector, state) in enumerate(zip(selectors, states, strict=True))
        ]
        x = decoder.forward(inputs_of(tokens, start, end, decoder), pools, products=blocks)
        if start == 0:
            for selector, state in zip(selectors, states, strict=True):
                selector.end_prompt(state)
    return rows_of(x, tokens.shape[1] - prompt), states


def dense_run(model: SparseModel, tokens: Tensor, prompt: int) -> list[Tensor]:
    decoder = model.decoder
    pools = pools_for(decoder, tokens)
    decoder.forward(inputs_of(tokens, 0, prompt, decoder), pools, NoHooks())
    x = decoder.forward(inputs_of(tokens, prompt, tokens.shape[1], decoder), pools, NoHooks())
    return rows_of(x, tokens.shape[1] - prompt)


@cache
def gathered(family: str = "llama", *, rows: int = 1 << 20, room: int = 1 << 30) -> Sequence[SparseProducts]:
    """Products that read active neurons only, for up to `rows` rows of a step."""
    model, budget = sparse_model(family), CompactBudget(room)
    products = [GatheredMlp.of(block, model.spec, budget) for block in model.decoder.blocks]
    for layer in products:
        layer.most_rows = rows
    return products
