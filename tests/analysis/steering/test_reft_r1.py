"""ReFT-r1: its training is plain autograd with hooks of transformers, and it finds a direction that was planted."""

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pytest
import torch
from engine_runs import loaded
from gradient_oracle import OraclePass
from sklearn.metrics import roc_auc_score
from tiny_models import tiny_model
from torch import Tensor

from patchclamp_server.analysis.neurons.products import DifferentiableModel
from patchclamp_server.analysis.neurons.targets import Example, LogitDifference
from patchclamp_server.analysis.progress import Progress
from patchclamp_server.analysis.steering.examples import Split, TokenPair
from patchclamp_server.analysis.steering.reft_r1 import direction
from patchclamp_server.analysis.steering.reft_r1.direction import (
    SPARSITY,
    Place,
    Sides,
    kept_states,
    kept_texts,
    mean_strength,
    train_direction,
)
from patchclamp_server.analysis.steering.reft_r1.evidence import measured
from patchclamp_server.analysis.steering.reft_r1.job import check_start
from patchclamp_server.analysis.steering.reft_r1.texts import log_probability, of_pairs
from patchclamp_server.analysis.training import Trained, Training, batch_order
from patchclamp_server.engine.exclusive import Slice, at_once
from patchclamp_server.errors import InvalidArgument
from patchclamp_server.model.sites import Site

Tokens = tuple[int, ...]
SEED = 11
POSITIVE: list[Tokens] = [(5, 9, 30, 31, 77, 78), (15, 19, 130, 4, 6), (5, 60, 61), (31, 32, 33, 34, 35, 36, 37)]
NEGATIVE: list[Tokens] = [(7, 8, 21, 22), (70, 8, 21, 90, 91), (10, 20, 30, 40, 50)]
HELDOUT: list[Tokens] = [(77, 5, 9, 12), (8, 4, 100, 101)]
HELDOUT_NEGATIVE: list[Tokens] = [(3, 8, 120), (44, 45, 46)]
PLACES = [
    ("llama", Place(1, Site.RESID_POST)),
    ("gpt2", Place(0, Site.RESID_MID)),
    ("gemma2", Place(2, Site.RESID_PRE)),
]


@pytest.fixture(autouse=True)
def few(monkeypatch: pytest.MonkeyPatch) -> None:
    """Texts of a handful of tokens have some that are not of the largest."""
    monkeypatch.setattr(direction, "TOP_K", 2)


class Oracle:
    """The formulas of ReFT-r1 with transformers, hooks and autograd, one text at a time."""

    def __init__(self, family: str, at: Place) -> None:
        self.model, self.at = tiny_model(family), at

    def states(self, text: Tokens) -> Tensor:
        run = OraclePass(self.model, Example(text, LogitDifference(0)))
        run.value()
        return run.seen[self.at.site, self.at.layer].detach().reshape(len(text), -1)

    def ordinary(self, text: Tokens) -> list[int]:
        norms = np.linalg.norm(self.states(text).numpy(), axis=1)
        median = np.sort(norms[1:])[(len(norms) - 2) // 2]
        return [t for t in range(1, len(text)) if norms[t] <= 3 * median]

    def latents(self, text: Tokens, unit: Tensor) -> Tensor:
        return (self.states(text)[self.ordinary(text)] @ unit).clamp(min=0)

    def strength(self, text: Tokens, unit: Tensor) -> Tensor:
        return self.latents(text, unit).sort(descending=True).values[:2].mean()

    def outside(self, text: Tokens, unit: Tensor) -> Tensor:
        found = self.latents(text, unit)
        return found.sort(descending=True).values[2:].sum() / len(found)

    def loss(self, text: Tokens, added: Tensor) -> Tensor:
        """-log p per token, with `added` at the ordinary tokens of a text that runs without its last token."""
        states, n = self.states(text)[:-1], len(text) - 1
        mask = torch.zeros(n, 1)
        mask[[t for t in self.ordinary(text) if t < n]] = 1
        example = log_probability(text)
        return -OraclePass(self.model, example, {(self.at.site, self.at.layer): states + mask * added}).value() / n

    def norm(self, texts: Sequence[Tokens]) -> float:
        return float(torch.cat([self.states(text)[self.ordinary(text)] for text in texts]).norm(dim=1).mean())

    def mean_difference(self) -> Tensor:
        means = [
            torch.stack([self.states(text)[self.ordinary(text)].mean(0) for text in side]).mean(0)
            for side in (POSITIVE, NEGATIVE)
        ]
        return means[0] - means[1]

    def total(self, positive: Sequence[Tokens], negative: Sequence[Tokens], unit: Tensor) -> Tensor:
        weight = SPARSITY / self.norm([*POSITIVE, *NEGATIVE])
        losses = [self.loss(text, self.strength(text, unit) * unit) for text in positive]
        outside = [self.outside(text, unit) for text in positive]
        latents = [self.latents(text, unit).mean() for text in negative]
        penalty = torch.stack(outside).mean() + torch.stack(latents).mean()
        return torch.stack(losses).mean() + weight * penalty

    def training(self, training: Training) -> tuple[Tensor, list[float]]:
        numbers = torch.nn.functional.normalize(self.mean_difference(), dim=0).requires_grad_()
        optimizer, losses = torch.optim.Adam([numbers], lr=training.learning_rate), []
        for step in range(training.max_steps):
            positive = [POSITIVE[i] for i in batch_order(len(POSITIVE), training.batch_size, SEED, step)]
            negative = [NEGATIVE[i] for i in batch_order(len(NEGATIVE), training.batch_size, SEED + 1, step)]
            loss = self.total(positive, negative, numbers / numbers.norm())
            losses.append(loss.item())
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        return (numbers / numbers.norm()).detach(), losses


def sides(model: DifferentiableModel, at: Place) -> tuple[Sides, Sides]:
    found = [
        Sides(at_once(kept_texts(model, positive, at)), at_once(kept_states(model, negative, at)))
        for positive, negative in ((POSITIVE, NEGATIVE), (HELDOUT, HELDOUT_NEGATIVE))
    ]
    return found[0], found[1]


def trained(family: str, at: Place, training: Training) -> Trained[Tensor]:
    model = DifferentiableModel.of(loaded(family).decoder)
    return at_once(train_direction(model, *sides(model, at), at, training, SEED))


@pytest.mark.parametrize(("family", "at"), PLACES)
def test_training_is_plain_autograd_steps_of_adam(family: str, at: Place) -> None:
    training = Training(max_steps=5, learning_rate=0.05, batch_size=2, patience=100)
    oracle = Oracle(family, at)
    expected, losses = oracle.training(training)
    found = trained(family, at, training)
    assert found.losses == pytest.approx(losses, rel=1e-4)
    # Evaluated before the first step and after the last; the better of both is kept.
    first = torch.nn.functional.normalize(oracle.mean_difference(), dim=0)
    held = [float(oracle.total(HELDOUT, HELDOUT_NEGATIVE, unit).detach()) for unit in (first, expected)]
    assert found.loss == pytest.approx(min(held), rel=1e-4)
    # Both may be equal but for rounding.
    best = min((first, expected), key=lambda unit: float((found.best - unit).abs().max()))
    torch.testing.assert_close(found.best, best, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize(("family", "at"), PLACES)
def test_evidence_is_what_hooks_measure_on_held_out_texts(family: str, at: Place) -> None:
    model, oracle = DifferentiableModel.of(loaded(family).decoder), Oracle(family, at)
    training, heldout = sides(model, at)
    difference = oracle.mean_difference()
    unit = torch.nn.functional.normalize(difference.roll(1), dim=0)
    vector = unit * mean_strength(training, unit)
    assert mean_strength(training, unit) == pytest.approx(
        float(torch.stack([oracle.strength(text, unit) for text in POSITIVE]).mean()), rel=1e-4
    )
    found = at_once(measured(model, vector, training, heldout, at, 7, SEED))
    told = found.training
    assert told is not None
    assert told.steps == 7

    def score(text: Tokens, along: Tensor) -> float:
        return float((oracle.states(text)[oracle.ordinary(text)] @ along / along.norm()).max())

    for along, area, accuracy in (
        (vector, told.auroc, found.heldout_accuracy),
        (difference, told.difference_auroc, told.difference_accuracy),
    ):
        both = [[score(text, along) for text in side] for side in (HELDOUT, HELDOUT_NEGATIVE)]
        labels = [1] * len(HELDOUT) + [0] * len(HELDOUT_NEGATIVE)
        assert area == pytest.approx(roc_auc_score(labels, both[0] + both[1]))
        middle = np.mean([np.mean([score(text, along) for text in side]) for side in (POSITIVE, NEGATIVE)])
        right = (np.mean(np.array(both[0]) > middle) + np.mean(np.array(both[1]) < middle)) / 2
        assert accuracy == pytest.approx(right)
        if along is vector:
            assert found.midpoint == pytest.approx(middle, rel=1e-4)
    losses = [
        float(np.mean([oracle.loss(text, added).item() for text in HELDOUT]))
        for added in (torch.zeros_like(vector), vector, difference)
    ]
    assert [told.unedited_loss, told.loss, told.difference_loss] == pytest.approx(losses, rel=1e-4)
    assert 0 <= told.random_auroc <= 1
    assert found.norm == pytest.approx(float(vector.norm()))


def test_training_ends_when_the_held_out_loss_no_longer_falls() -> None:
    # So large a step only shakes the direction.
    found = trained("llama", PLACES[0][1], Training(max_steps=500, learning_rate=5.0, batch_size=2, patience=2))
    assert len(found.losses) < 500


def test_what_had_the_lowest_held_out_loss_is_kept() -> None:
    at = PLACES[0][1]
    found = trained("llama", at, Training(max_steps=40, learning_rate=0.05, batch_size=4, patience=9))
    oracle = Oracle("llama", at)
    first = torch.nn.functional.normalize(oracle.mean_difference(), dim=0)
    assert found.loss < float(oracle.total(HELDOUT, HELDOUT_NEGATIVE, first).detach())
    assert found.loss == pytest.approx(float(oracle.total(HELDOUT, HELDOUT_NEGATIVE, found.best).detach()), rel=1e-4)


def test_steps_are_told_and_no_slice_is_longer_than_a_block_of_a_batch() -> None:
    """Neighbours run between slices: each asks for at most two passes of the rows of a batch through one block, or for
    the logits of these."""
    at = PLACES[0][1]
    model = DifferentiableModel.of(loaded("llama").decoder)
    work = train_direction(model, *sides(model, at), at, Training(max_steps=3), SEED)
    told, rows = [], sum(len(text) for text in POSITIVE)
    with torch.inference_mode():
        event = next(work)
        while True:
            try:
                if isinstance(event, Slice):
                    assert event.rows <= 2 * rows
                    event = work.send(1)
                else:
                    told.append(event)
                    event = next(work)
            except StopIteration:
                break
    assert told == [Progress("training of layer 1", step, 3) for step in (1, 2, 3)]


def test_a_direction_on_which_no_positive_projects_is_no_beginning() -> None:
    """Both sides lie behind the origin, the positives less far: every latent is 0, and so is every gradient."""
    at = PLACES[0][1]
    training, _ = sides(DifferentiableModel.of(loaded("llama").decoder), at)
    away = torch.zeros(training.negative[0].shape[1])
    away[0] = 1.0
    positive = [replace(text, states=text.states - 100 * away) for text in training.positive]
    behind = Sides(positive, [states - 200 * away for states in training.negative])
    with pytest.raises(InvalidArgument, match="no token of a positive projects") as refused:
        check_start(behind, 1, "pairs")
    assert refused.value.field == "pairs"
    check_start(training, 1, "pairs")


def test_texts_of_pairs_are_dealt_by_the_seed_and_bounded_before_anything_runs() -> None:
    spec = loaded("llama").decoder.spec
    pairs = [TokenPair(text, text[::-1]) for text in POSITIVE]
    found = of_pairs(pairs, Split(0.25, 3), spec)
    assert found.numbers == dict.fromkeys(("training_positives", "training_negatives"), 3) | dict.fromkeys(
        ("heldout_positives", "heldout_negatives"), 1
    )
    assert sorted(found.training.positive + found.heldout.positive) == sorted(POSITIVE)
    assert [text[::-1] for text in found.training.positive] == found.training.negative
    with pytest.raises(InvalidArgument, match="the bound is") as refused:
        of_pairs(pairs * 400, Split(0.25, 3), spec, max_bytes=1 << 20)
    assert refused.value.field == "pairs"
    with pytest.raises(InvalidArgument, match="at least two") as refused:
        of_pairs([*pairs, TokenPair((4,), (4, 5))], Split(0.25, 3), spec)
    assert refused.value.field == "pairs[4].positive"
