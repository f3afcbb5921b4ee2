"""Distributed alignment search: its training is plain autograd, and it finds a subspace that was planted."""

from pathlib import Path

import numpy as np
import pytest
import torch
from engine_runs import loaded
from gradient_oracle import OraclePass
from planted_subspace import MINUS, PLUS, save_planted_subspace
from tiny_models import tiny_model
from torch import Tensor

from patchclamp_server.analysis.neurons.products import DifferentiableModel
from patchclamp_server.analysis.neurons.targets import Example, LogitDifference, LogProbability
from patchclamp_server.analysis.subspaces.alignment import (
    Alignment,
    Examples,
    align,
    initial_weights,
    rotation_of,
)
from patchclamp_server.analysis.subspaces.interchange import Pair, check_pairs, likeliest_tokens, prepared
from patchclamp_server.analysis.subspaces.job import split
from patchclamp_server.analysis.training import Training, batch_order
from patchclamp_server.engine.exclusive import Slice, at_once
from patchclamp_server.errors import InvalidArgument
from patchclamp_server.model.load import LoadedModel, load_model
from patchclamp_server.model.sites import Site


def last(n: int, k: int = 1) -> np.ndarray:
    return np.arange(n) >= n - k


def pair(base: tuple[int, ...], source: tuple[int, ...], answer: tuple[int, ...], k: int = 1) -> Pair:
    return Pair(base, source, answer, last(len(base), k), last(len(source), k))


PAIRS = [
    pair((5, 9, 30), (7, 8, 21, 22), (40,), 2),
    pair((15, 19, 130, 4), (7, 80), (41, 17), 2),
    pair((5, 60), (70, 8, 21), (9,), 2),
    pair((31, 32, 33), (10, 20, 30), (40, 3), 2),
]
HELDOUT = [pair((77, 5, 9), (8, 4), (40,), 2)]


def oracle_training(
    family: str, site: Site, layer: int, rank: int, training: Training, seed: int
) -> tuple[Tensor, list[float]]:
    """The same steps with transformers, hooks and autograd, one pair at a time."""
    model = tiny_model(family)
    states = []
    for each in PAIRS:
        found = []
        for example in (Example(each.base, LogProbability(each.answer)), Example(each.source, LogitDifference(0))):
            run = OraclePass(model, example)
            run.value()
            found.append(run.seen[site, layer].detach().reshape(len(example.tokens), -1))
        states.append(found)
    weights = initial_weights(states[0][0].shape[1], rank, seed).requires_grad_()
    optimizer, losses = torch.optim.Adam([weights], lr=training.learning_rate), []
    for step in range(training.max_steps):
        values = []
        rotation = rotation_of(weights)
        for i in batch_order(len(PAIRS), training.batch_size, seed, step):
            (base, source), each = states[i], PAIRS[i]
            n = len(each.base)
            own, other = base[n - 2 : n], source[-2:]
            changed = own + (other - own) @ rotation.T @ rotation
            replaced = torch.cat((base[: n - 2], changed, base[n:]))
            example = Example(each.base, LogProbability(each.answer))
            values.append(OraclePass(model, example, {(site, layer): replaced}).value())
        loss = -torch.stack(values).mean()
        losses.append(loss.item())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return rotation_of(weights.detach()), losses


@pytest.mark.parametrize(
    ("family", "site", "layer"),
    [("llama", Site.RESID_POST, 1), ("gpt2", Site.MLP_OUT, 0), ("gemma2", Site.RESID_PRE, 2)],
)
def test_training_is_plain_autograd_steps_of_adam(family: str, site: Site, layer: int) -> None:
    training = Training(max_steps=6, learning_rate=0.05, batch_size=3, patience=100)
    expected, losses = oracle_training(family, site, layer, 2, training, seed=11)
    model = DifferentiableModel.of(loaded(family).decoder)
    pairs, heldout = at_once(prepared(model, PAIRS, layer, site)), at_once(prepared(model, HELDOUT, layer, site))
    found = at_once(align(model, Examples(pairs, heldout, [], [], [5], []), layer, site, 2, training, seed=11))
    assert found.losses == pytest.approx(losses, rel=1e-4)
    assert found.steps == training.max_steps
    # Evaluated before the first step and after the last; the better of both is kept.
    first = rotation_of(initial_weights(expected.shape[1], 2, 11))
    best = min((first, expected), key=lambda rotation: float((found.rotation - rotation).abs().max()))
    torch.testing.assert_close(found.rotation, best, rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(found.rotation @ found.rotation.T, torch.eye(2), rtol=1e-5, atol=1e-5)


@pytest.fixture(scope="module")
def planted(tmp_path_factory: pytest.TempPathFactory) -> LoadedModel:
    directory: Path = tmp_path_factory.mktemp("planted")
    save_planted_subspace(directory)
    return load_model(str(directory))


def planted_pairs(model: LoadedModel) -> list[Pair]:
    """Every capital gets the sign of another; what it answers then is that sign."""
    encode = model.tokenizer.convert_tokens_to_ids
    found = []
    for i, letter in enumerate(PLUS + MINUS):
        for step in (1, 5, 12):
            other = (PLUS + MINUS)[(i + step) % 24]
            answer = "+" if other in PLUS else "-"
            found.append(pair((encode("Z"), encode(letter)), (encode(other),), (encode(answer),)))
    return found


def aligned(model: LoadedModel, training: Training, rank: int = 1) -> Alignment:
    differentiable, pairs = DifferentiableModel.of(model.decoder), planted_pairs(model)
    train, held = split(len(pairs), 0.25, 0)
    ready = at_once(prepared(differentiable, pairs, 0, Site.RESID_POST))
    against = at_once(likeliest_tokens(differentiable, [pairs[i].base for i in held]))
    examples = Examples([ready[i] for i in train], [ready[i] for i in held], [], [], against, [])
    return at_once(align(differentiable, examples, 0, Site.RESID_POST, rank, training, seed=0))


def test_a_planted_direction_is_recovered_and_does_better_than_a_random_one(planted: LoadedModel) -> None:
    found = aligned(planted, Training(max_steps=120, learning_rate=0.05, batch_size=32))
    # The cosine of the principal angle with the planted direction, which is dimension 0; the norm, which answers depend
    # on as well, keeps it from 1.
    assert abs(float(found.rotation[0, 0])) > 0.97
    assert found.accuracy == 1.0
    assert found.full_accuracy == 1.0
    assert found.random_accuracy < 0.8
    assert found.kept_accuracy is None


def test_training_ends_when_the_held_out_loss_no_longer_falls(planted: LoadedModel) -> None:
    # So large a step only shakes the direction.
    found = aligned(planted, Training(max_steps=500, learning_rate=5.0, batch_size=16, patience=2))
    assert found.steps < 500


def test_kept_pairs_are_trained_on_and_reported(planted: LoadedModel) -> None:
    model, pairs = DifferentiableModel.of(planted.decoder), planted_pairs(planted)
    encode = planted.tokenizer.convert_tokens_to_ids
    # A digit's answer stays whatever sign comes into it.
    kept = [
        pair((encode(digit),), (encode(letter),), (encode(answer),))
        for digit, answer in zip("0123456", "abcdefg", strict=True)
        for letter in "AB"
    ]
    ready, ready_kept = (at_once(prepared(model, each, 0, Site.RESID_POST)) for each in (pairs, kept))
    against = at_once(likeliest_tokens(model, [each.base for each in pairs[:6]]))
    kept_against = at_once(likeliest_tokens(model, [each.source for each in kept[:4]]))
    examples = Examples(ready[6:], ready[:6], ready_kept[4:], ready_kept[:4], against, kept_against)
    training = Training(max_steps=150, learning_rate=0.03, batch_size=16)
    found = at_once(align(model, examples, 0, Site.RESID_POST, 1, training, seed=0))
    assert found.kept_accuracy == 1.0
    # Nothing of the plane of the digits is exchanged.
    assert float(found.rotation[0, 1:3].abs().max()) < 0.2


def test_no_slice_is_longer_than_a_block_of_a_batch(planted: LoadedModel) -> None:
    """Neighbours run between slices: each asks for at most two passes of the rows of a batch through one block, or for
    the logits of these."""
    model, pairs = DifferentiableModel.of(planted.decoder), planted_pairs(planted)
    ready = at_once(prepared(model, pairs, 0, Site.RESID_POST))
    training = Training(max_steps=3, batch_size=8)
    work = align(model, Examples(ready[2:], ready[:2], [], [], [0, 0], []), 0, Site.RESID_POST, 1, training, seed=0)
    slices = 0
    with torch.inference_mode():
        told = next(work)
        while True:
            try:
                if isinstance(told, Slice):
                    slices += 1
                    assert told.rows <= 2 * 8 * 2
                    told = work.send(1)
                else:
                    told = next(work)
            except StopIteration:
                break
    # A forward and a backward pass of two blocks, the logits and Adam for each step, at least.
    assert slices > 3 * 6


def test_pairs_that_need_too_much_memory_are_refused_before_anything_is_computed(planted: LoadedModel) -> None:
    pairs = planted_pairs(planted)
    check_pairs(pairs, planted.decoder.spec, Site.RESID_POST)
    with pytest.raises(InvalidArgument) as refused:
        check_pairs(pairs * 100, planted.decoder.spec, Site.RESID_POST, max_bytes=1 << 20)
    assert refused.value.field == "pairs"
