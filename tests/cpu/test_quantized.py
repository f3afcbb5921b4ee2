"""Codes of quantised weights are found again exactly, and multiplied as the float32 matrix would be."""

import pytest
import torch

from patchclamp_server.cpu.linear import Linear
from patchclamp_server.cpu.quantized import GROUP, recover


def affine_4(out: int, width: int) -> torch.Tensor:
    """Weights as GGML's Q4_1 holds them: half-precision scale and minimum, codes 0 to 15, both ends in use."""
    generator = torch.Generator().manual_seed(out)
    codes = torch.randint(0, 16, (out, width // GROUP, GROUP), generator=generator)
    codes[:, :, 3], codes[:, :, 7] = 0, 15
    scale = (torch.rand(out, width // GROUP, 1, generator=generator) * 0.02 + 1e-3).half().float()
    low = (-torch.rand(out, width // GROUP, 1, generator=generator)).half().float()
    return (codes * scale + low).view(out, width)


def symmetric_8(out: int, width: int) -> torch.Tensor:
    """Weights as GGML's Q8_0 holds them: half-precision scale, codes -127 to 127, the largest in use."""
    generator = torch.Generator().manual_seed(out)
    codes = torch.randint(-127, 128, (out, width // GROUP, GROUP), generator=generator)
    codes[:, :, 5] = -127
    scale = (torch.rand(out, width // GROUP, 1, generator=generator) * 0.02 + 1e-4).half().float()
    return (codes * scale).view(out, width)


@pytest.mark.parametrize(("make", "bits"), [(affine_4, 4), (symmetric_8, 8)])
@pytest.mark.parametrize("shape", [(16, 32), (48, 96), (960, 576)])
def test_products_equal_those_of_the_matrix(make: object, bits: int, shape: tuple[int, int]) -> None:
    weight = make(*shape)  # type: ignore[operator]
    quantized = recover(weight)
    assert quantized is not None
    assert quantized.bits == bits
    x = torch.randn(3, shape[1], generator=torch.Generator().manual_seed(1))
    exact = x.double() @ weight.double().t()
    assert (quantized.multiply(x) - exact).abs().max() <= 2e-6 * exact.abs().max()


def test_a_group_of_equal_weights_is_kept() -> None:
    weight = affine_4(16, 64)
    weight[3, :32] = 0.25
    weight[4, 32:] = 0.0
    quantized = recover(weight)
    assert quantized is not None
    x = torch.ones(1, 64)
    torch.testing.assert_close(quantized.multiply(x)[0, 3:5], weight[3:5].sum(1))


def test_weights_that_were_never_quantised_are_left_alone() -> None:
    assert recover(torch.randn(32, 64)) is None


def test_one_weight_off_the_grid_is_enough_to_refuse() -> None:
    weight = affine_4(32, 64)
    weight[7, 11] += 1e-4
    assert recover(weight) is None


@pytest.mark.parametrize("shape", [(15, 32), (16, 31)])
def test_shapes_without_whole_groups_are_left_alone(shape: tuple[int, int]) -> None:
    assert recover(torch.zeros(shape)) is None


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
    torch.testing.assert_close(linear.rows(outputs), weight[outputs])
    torch.testing.assert_close(linear.columns(inputs), weight.t()[inputs])
    assert linear.rows(outputs[:0]).shape == (0, 96)
