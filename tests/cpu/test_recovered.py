"""Blocks that a float32 matrix was made of are found again to the bit."""

import pytest
import torch
from stored_weights import affine_4, symmetric_8

from patchclamp_server.cpu.linear import Linear
from patchclamp_server.cpu.recovered import recovered
from patchclamp_server.cpu.stored import Format


@pytest.mark.parametrize(("make", "format"), [(affine_4, Format.Q4_1), (symmetric_8, Format.Q8_0)])
@pytest.mark.parametrize("shape", [(16, 32), (5, 96), (960, 576)])
def test_blocks_are_found_again(make: object, format: Format, shape: tuple[int, int]) -> None:
    weight = make(*shape)  # type: ignore[operator]
    found = recovered(weight)
    assert found is not None
    assert [part.format for part in found.parts] == [format]
    assert torch.equal(found.dense(), weight)


def test_a_group_of_equal_weights_is_kept() -> None:
    weight = affine_4(16, 64)
    weight[3, :32] = 0.25
    weight[4, 32:] = 0.0
    found = recovered(weight)
    assert found is not None
    assert torch.equal(found.dense(), weight)


def test_weights_that_were_never_quantised_are_left_alone() -> None:
    assert recovered(torch.randn(32, 64)) is None


def test_one_weight_off_the_grid_is_enough_to_refuse() -> None:
    weight = affine_4(32, 64)
    weight[7, 11] += 1e-4
    assert recovered(weight) is None


def test_rows_without_whole_groups_are_left_alone() -> None:
    assert recovered(torch.zeros(16, 31)) is None


@pytest.mark.parametrize("make", [affine_4, symmetric_8, lambda out, width: torch.randn(out, width)])
@pytest.mark.parametrize("biased", [False, True])
def test_every_number_of_rows_gives_the_same_product(make: object, biased: bool) -> None:
    weight = make(64, 96)  # type: ignore[operator]
    bias = torch.randn(64) if biased else None
    linear = Linear(weight, bias)
    x = torch.randn(9, 96)
    exact = x.double() @ weight.double().t() + (0 if bias is None else bias.double())
    for rows in (1, 2, 3, 9):
        assert (linear(x[:rows]) - exact[:rows]).abs().max() <= 2e-6 * exact.abs().max()


@pytest.mark.parametrize("make", [affine_4, symmetric_8, lambda out, width: torch.randn(out, width)])
@pytest.mark.parametrize("batch_invariant", [False, True])
def test_chosen_rows_and_columns_are_those_of_the_matrix(make: object, batch_invariant: bool) -> None:
    weight = make(64, 96)  # type: ignore[operator]
    linear = Linear(weight, torch.randn(64), batch_invariant=batch_invariant)
    outputs, inputs = torch.tensor([63, 0, 17, 17]), torch.tensor([95, 31, 32, 0])
    assert torch.equal(linear.rows(outputs), weight[outputs])
    assert torch.equal(linear.columns(inputs), weight.t()[inputs])
    assert linear.rows(outputs[:0]).shape == (0, 96)
