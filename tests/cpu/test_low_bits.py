"""Packed low-bit copies: what is packed is what is multiplied by."""

import pytest
import torch
from torch import Tensor

from patchclamp_server.cpu.sparse import LowBitMatrix, fields

BITS = (2, 3, 4, 8)
# Outputs, inputs and inputs of a group: whole and broken lanes, words and groups.
SHAPES = [(33, 48, 48), (96, 576, 64), (160, 128, 64), (5, 97, 1), (64, 70, 35), (100, 4096, 64)]


def packed(bits: int, out: int, width: int, group: int) -> tuple[LowBitMatrix, Tensor]:
    """A copy, and the matrix [out, in] that it is of."""
    generator = torch.Generator().manual_seed(bits * out + width)
    codes = torch.randint(0, 2**bits, (out, width), dtype=torch.uint8, generator=generator)
    scale, low = (torch.randn(out, width // group, generator=generator).bfloat16().float() for _ in range(2))
    weight = (codes.view(out, -1, group) * scale[..., None] + low[..., None]).view(out, width)
    return LowBitMatrix.of(codes, scale, low, bits), weight


def rows(n: int, width: int) -> Tensor:
    return torch.randn(n, width, generator=torch.Generator().manual_seed(width))


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize(("out", "width", "group"), SHAPES)
def test_unpacked_it_is_the_same_bits(bits: int, out: int, width: int, group: int) -> None:
    matrix, weight = packed(bits, out, width, group)
    assert torch.equal(matrix.matrix(), weight.t())


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize(("out", "width", "group"), SHAPES)
def test_the_product_is_that_of_x_in_16_bits(bits: int, out: int, width: int, group: int) -> None:
    matrix, weight = packed(bits, out, width, group)
    x = rows(2, width)
    step = x.view(2, -1, group).abs().amax(2, keepdim=True) / 32767
    worst = (step / 2).expand(-1, -1, group).reshape(2, width).double() @ weight.abs().double().t()
    exact = x.double() @ weight.double().t()
    error = (matrix.multiply(x) - exact).abs()
    rounding = 1e-6 * (x.abs().double() @ weight.abs().double().t())
    assert bool((error <= worst + rounding).all())


def test_what_16_bits_hold_is_multiplied_exactly() -> None:
    matrix, weight = packed(3, 96, 576, 64)
    x = torch.randint(-32767, 32768, (1, 576), generator=torch.Generator().manual_seed(0)).float()
    x[:, ::64] = 32767
    exact = x.double() @ weight.double().t()
    torch.testing.assert_close(matrix.multiply(x).double(), exact, rtol=1e-5, atol=1.0)


def test_a_row_does_not_depend_on_its_neighbour() -> None:
    matrix, _ = packed(3, 96, 576, 64)
    x = rows(2, 576)
    assert torch.equal(matrix.multiply(x)[1:], matrix.multiply(x[1:]))


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_an_input_that_is_no_number_shows_in_its_row_alone(value: float) -> None:
    matrix, _ = packed(3, 96, 576, 64)
    x = rows(2, 576)
    x[0, 3] = value
    y = matrix.multiply(x)
    assert not y[0].isfinite().any()
    assert y[1].isfinite().all()


@pytest.mark.parametrize("value", [0.0, 1e-42, 1e-36])
def test_nothing_and_next_to_nothing_are_zero(value: float) -> None:
    matrix, _ = packed(3, 96, 576, 64)
    found = matrix.multiply(torch.full((1, 576), value))
    torch.testing.assert_close(found, torch.zeros(1, 96), rtol=0, atol=1e-30)


def test_the_number_of_threads_does_not_change_bits() -> None:
    matrix, _ = packed(3, 5000, 4096, 64)
    x = rows(1, 4096)
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        alone = matrix.multiply(x)
        torch.set_num_threads(3)
        assert torch.equal(matrix.multiply(x), alone)
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize("bits", BITS)
def test_bits_per_weight_are_those_of_the_memory(bits: int) -> None:
    matrix, weight = packed(bits, 160, 4096, 64)
    memory = 8 * (matrix.words.nbytes + matrix.scales.nbytes) / weight.numel()
    assert LowBitMatrix.bits_per_weight(bits, 64) == memory


def test_all_formats_are_compiled_at_once() -> None:
    for bits in BITS:
        matrix, _ = packed(bits, 96, 576, 64)
        matrix.multiply(rows(1, 576))
    for function in (fields.round_groups, fields.multiply_fields):
        assert len(function.signatures) == 1
