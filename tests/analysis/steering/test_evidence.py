"""The evidence card: what it measures on held-out pairs, and how pairs are held out."""

import math

import pytest
import torch

from patchclamp_server.analysis.steering.evidence import (
    LayerEvidence,
    Sides,
    best_layer,
    layer_evidence,
    shuffled,
    training_pairs,
    warnings,
)
from patchclamp_server.errors import InvalidArgument

WIDTH = 512


def sides(n: int, direction: torch.Tensor, seed: int) -> Sides:
    """Both sides at ± direction, in unit noise, around an offset that the threshold has to find."""
    noise = torch.randn(2, n, len(direction), generator=torch.Generator().manual_seed(seed))
    return Sides(10 + noise[0] + direction, 10 + noise[1] - direction)


def unit(width: int = WIDTH, seed: int = 0) -> torch.Tensor:
    return torch.nn.functional.normalize(torch.randn(width, generator=torch.Generator().manual_seed(seed)), dim=0)


def test_the_planted_direction_is_right_and_random_directions_are_near_chance() -> None:
    planted = 4 * unit()
    evidence = layer_evidence(7, planted, sides(200, planted, 1), sides(200, planted, 2), seed=3)
    assert evidence.layer == 7
    assert evidence.heldout_accuracy > 0.99
    assert 0.45 < evidence.random_accuracy < 0.62


def test_random_directions_are_turned_to_the_side_where_the_training_pairs_are() -> None:
    """In one dimension every direction is the planted one or its opposite; unturned, half of them would be wrong."""
    planted = torch.tensor([8.0])
    evidence = layer_evidence(0, planted, sides(40, planted, 1), sides(40, planted, 2), seed=3)
    assert evidence.random_accuracy == 1.0
    reversed_ = layer_evidence(0, planted, sides(40, -planted, 1), sides(40, -planted, 2), seed=3)
    assert reversed_.random_accuracy == 1.0


def test_a_direction_turned_round_is_wrong() -> None:
    planted = 4 * unit()
    evidence = layer_evidence(0, -planted, sides(200, planted, 1), sides(200, planted, 2), seed=0)
    assert evidence.heldout_accuracy < 0.01
    assert evidence.margin < 0


def test_the_threshold_comes_from_the_training_pairs() -> None:
    axis = torch.tensor([1.0, 0.0])
    training = Sides(torch.tensor([[4.0, 0.0]]), torch.tensor([[2.0, 0.0]]))
    heldout = Sides(torch.tensor([[3.5, 0.0], [2.9, 0.0]]), torch.tensor([[1.0, 0.0], [2.0, 0.0]]))
    # 3 is between 2.9 and the other positive; a threshold fitted to the held-out pairs would be right on all four.
    assert layer_evidence(0, axis, training, heldout, seed=0).heldout_accuracy == 0.75


def test_the_midpoint_is_on_the_scale_of_the_unit_direction() -> None:
    training = Sides(torch.tensor([[4.0, 9.0], [6.0, 9.0]]), torch.tensor([[2.0, 9.0], [0.0, 9.0]]))
    short, long = (
        layer_evidence(0, length * torch.tensor([1.0, 0.0]), training, training, seed=0) for length in (0.1, 70.0)
    )
    assert short.midpoint == long.midpoint == (5 + 1) / 2


def test_norms_and_explained_variance_are_what_they_say() -> None:
    training = Sides(torch.tensor([[1.0, 0.0]]), torch.tensor([[-1.0, 0.0]]))
    heldout = Sides(torch.tensor([[3.0, 4.0], [3.0, 4.0]]), torch.tensor([[0.0, 0.0], [3.0, 0.0]]))
    evidence = layer_evidence(0, torch.tensor([2.0, 0.0]), training, heldout, seed=0)
    assert evidence.norm == 2
    assert evidence.activation_norm == pytest.approx((5 + 5 + 0 + 3) / 4)
    # Differences (3, 4) and (0, 4): 9 of 25 + 16 lie along the first axis.
    assert evidence.explained_variance == pytest.approx(9 / 41)


def test_the_margin_is_in_standard_deviations() -> None:
    training = Sides(torch.tensor([[1.0]]), torch.tensor([[-1.0]]))
    heldout = Sides(torch.tensor([[4.0], [6.0]]), torch.tensor([[-1.0], [1.0]]))
    assert layer_evidence(0, torch.tensor([3.0]), training, heldout, seed=0).margin == pytest.approx(5.0)


def test_equal_held_out_sides_give_finite_evidence() -> None:
    constant = Sides(torch.ones(3, 4), torch.ones(3, 4))
    evidence = layer_evidence(0, torch.ones(4), constant, constant, seed=0)
    assert evidence.explained_variance == evidence.margin == 0
    assert math.isfinite(evidence.random_accuracy)


def test_the_best_layer_has_the_best_accuracy_then_the_larger_margin() -> None:
    def at(layer: int, accuracy: float, margin: float) -> LayerEvidence:
        return LayerEvidence(layer, accuracy, 0.5, 1.0, 1.0, 0.1, margin, midpoint=0.0)

    assert best_layer([at(0, 0.9, 9.0), at(3, 1.0, 2.0), at(5, 1.0, 3.0), at(8, 0.8, 5.0)]) == 5


def test_differences_of_equal_size_in_k_coordinates_have_a_participation_ratio_of_k() -> None:
    axis = torch.eye(5)
    pairs = Sides(torch.cat((axis[:3], -axis[:3])), torch.zeros(6, 5))
    assert layer_evidence(0, axis[0], pairs, pairs, seed=0).participation_ratio == pytest.approx(3)


def test_a_coordinate_that_drowns_the_others_is_warned_of() -> None:
    loud = unit()
    loud[7] = 0.0
    evidence = [layer_evidence(3, loud, sides(40, loud, 1), sides(40, loud, 2), seed=0)]
    assert not warnings(evidence)
    for each in (training := sides(40, loud, 1), heldout := sides(40, loud, 2)):
        each.positive[:, 7] *= 100
    evidence.append(layer_evidence(5, loud, training, heldout, seed=0))
    (warning,) = warnings(evidence)
    assert "coordinates" in warning
    assert ": 5 (1.0);" in warning


def test_the_split_is_seeded_and_uses_every_pair() -> None:
    assert shuffled(50, 4) == shuffled(50, 4) != shuffled(50, 5)
    assert sorted(shuffled(50, 4)) == list(range(50))
    assert len(shuffled(5, 2**64 - 1)) == 5


@pytest.mark.parametrize(("pairs", "fraction", "training"), [(3, 0.25, 2), (4, 0.01, 3), (48, 0.25, 36), (10, 0.8, 2)])
def test_at_least_one_pair_is_held_out(pairs: int, fraction: float, training: int) -> None:
    assert training_pairs(pairs, fraction) == training


@pytest.mark.parametrize(("pairs", "fraction"), [(0, 0.25), (1, 0.25), (2, 0.5), (4, 0.9)])
def test_too_few_pairs_are_refused(pairs: int, fraction: float) -> None:
    with pytest.raises(InvalidArgument, match="at least 2") as refused:
        training_pairs(pairs, fraction)
    assert refused.value.field == "pairs"


def test_sides_that_are_no_pairs_may_differ_in_number() -> None:
    axis = torch.tensor([1.0, 0.0])
    training = Sides(torch.tensor([[4.0, 0.0]] * 3), torch.tensor([[0.0, 0.0]]))
    heldout = Sides(torch.tensor([[3.0, 1.0], [1.0, 0.0]]), torch.tensor([[1.0, 0.0], [0.0, 0.0], [5.0, 0.0]]))
    evidence = layer_evidence(0, axis, training, heldout, seed=0)
    assert evidence.midpoint == 2.0
    assert evidence.heldout_accuracy == pytest.approx((1 / 2 + 2 / 3) / 2)
    # Differences (2, 1) and (1, 0), as far as both sides go.
    assert evidence.explained_variance == pytest.approx(5 / 6)
