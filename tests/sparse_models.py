"""Tiny models as policies see them, with profiles of every policy that has one."""

from collections.abc import Sequence
from functools import cache

import torch
from tiny_models import VOCAB, tiny_model
from torch import Tensor

from patchclamp_server.analysis.documents import inputs_of, pools_for
from patchclamp_server.analysis.sparsity.calibrate import CALIBRATIONS, calibrate
from patchclamp_server.engine.exclusive import at_once
from patchclamp_server.model.decoder import NoHooks
from patchclamp_server.model.weights import decoder_from_transformers
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
    decoder = decoder_from_transformers(tiny_model(family), dtype=torch.float32, device="cpu")
    return SparseModel(family, decoder)


def documents(n: int, tokens: int, seed: int = 0) -> Tensor:
    return torch.randint(3, VOCAB, (n, tokens), generator=torch.Generator().manual_seed(seed))


@cache
def profile(name: str, family: str = "llama") -> Profile | None:
    if name not in CALIBRATIONS:
        return None
    policy = Teal(allocation="greedy") if name == "teal" else POLICIES[name]()
    return at_once(calibrate(policy, sparse_model(family), documents(4, 32, seed=7), {"text": "random tokens"}))


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
