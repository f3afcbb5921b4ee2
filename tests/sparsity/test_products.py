"""Products that read active neurons only give what the dense products and a mask give."""

import gc

import pytest
import torch
from sparse_models import NAMES, bound, calibrated, dense_run, documents, gathered, run, sparse_model

from patchclamp_server.analysis.documents import inputs_of, pools_for
from patchclamp_server.sparsity.apply import Rows, Step, forced_neurons
from patchclamp_server.sparsity.blocks import sparse_blocks
from patchclamp_server.sparsity.policies import POLICIES
from patchclamp_server.sparsity.policies.fovea import Fovea
from patchclamp_server.sparsity.policy import FixedSet
from patchclamp_server.sparsity.products import CompactBudget

PROMPT, TOKENS = 12, 18
FAMILIES = ("llama", "gpt2", "opt", "gemma3")


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("keep", [0.0, 0.3, 0.7])
def test_gathered_products_equal_masked_ones(family: str, name: str, keep: float) -> None:
    """Sequences of one policy share a step; layer 0 has forced neurons, layer 1 is dense by force."""
    model, tokens = sparse_model(family), documents(2, TOKENS, seed=5)
    selector = bound(POLICIES[name](keep_ratio=keep), family)
    forced = {0: forced_neurons([1, 5]), 1: None}
    masked, _ = run(model, tokens, PROMPT, [selector] * 2, forced)
    ours, _ = run(model, tokens, PROMPT, [selector] * 2, forced, gathered(family))
    # Fovea's sketch takes x in 16 bits: a last bit of x that differs can be a whole step.
    tolerance = 1e-3 if name == "fovea" else 2e-5
    for a, b in zip(ours, masked, strict=True):
        torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)


def test_the_weights_of_inactive_neurons_are_not_read() -> None:
    """Poisoned, they would show; they do when they are active."""
    model, tokens = sparse_model(), documents(1, TOKENS)
    half = tuple(range(0, model.spec.d_ff, 2))
    policy = POLICIES["static_set"](neurons=dict.fromkeys(range(model.n_layers), half))
    selector, state = policy.bind(model), policy.bind(model).begin()
    down = [layer.mlp._outputs.weight for layer in gathered()]
    kept = [weight.copy() for weight in down]
    try:
        for weight in down:
            weight[1::2] = float("nan")
        step = Step([Rows(slice(0, TOKENS), selector, state)])
        decoder, products = model.decoder, sparse_blocks(model, step, gathered())
        x = decoder.forward(inputs_of(tokens, 0, TOKENS, decoder), pools_for(decoder, tokens), products=products)
        assert torch.isfinite(x).all()
        step.rows = [Rows(slice(0, TOKENS), selector, selector.begin(), forced={0: forced_neurons([3])})]
        x = decoder.forward(inputs_of(tokens, 0, TOKENS, decoder), pools_for(decoder, tokens), products=products)
        assert torch.isnan(x).all()
    finally:
        for weight, before in zip(down, kept, strict=True):
            weight[:] = before


def test_a_compact_copy_gives_its_bytes_back_when_its_sequence_ends() -> None:
    budget = CompactBudget(100)
    first, second = (FixedSet(torch.ones(3, dtype=torch.bool), torch.arange(3)) for _ in range(2))
    assert budget.take(60, first)
    assert not budget.take(60, second)
    del first
    gc.collect()
    assert budget.take(60, second)


@pytest.mark.parametrize("name", ["griffin", "static_set"])
def test_without_room_for_compact_copies_the_result_is_the_same(name: str) -> None:
    model, tokens = sparse_model(), documents(1, TOKENS)
    selector = bound(POLICIES[name](keep_ratio=0.5))
    roomy, _ = run(model, tokens, PROMPT, [selector], products=gathered())
    crowded, _ = run(model, tokens, PROMPT, [selector], products=gathered(room=-1))
    torch.testing.assert_close(roomy[0], crowded[0], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("products", [False, True], ids=["masked", "gathered"])
def test_what_is_dropped_is_stood_in_for(products: bool) -> None:
    """With eight bits fovea's copy of the weights is nearly exact, so that an empty set changes next to nothing."""
    model, tokens = sparse_model(), documents(1, TOKENS)
    found = calibrated(Fovea(bits=8, budget="uniform"), documents(4, 32, seed=7))
    dense, errors = dense_run(model, tokens, PROMPT)[0], []
    for compensate in (True, False):
        policy = Fovea(keep_ratio=0.0, bits=8, budget="uniform", compensate=compensate)
        ours, _ = run(model, tokens, PROMPT, [policy.bind(model, found)], products=gathered() if products else None)
        errors.append(float((ours[0] - dense).norm() / dense.norm()))
    assert errors[0] < 0.02 < 0.2 < errors[1]
