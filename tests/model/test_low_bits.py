"""Packed low-bit copies: what is packed is what is multiplied by."""

import pytest
import torch
from torch import Tensor

from patchclamp_server.model.sparse import LowBitInputs, LowBitOutputs, fields

BITS = (2, 3, 4, 8)
# Rows, columns and columns of a group: whole and broken lanes, words and groups.
SHAPES = [(33, 48, 48), (96, 576, 64), (160, 128, 64), (5, 97, 1), (64, 70, 35), (100, 4096, 64)]
LAYOUTS = [LowBitOutputs, LowBitInputs]


class Case:
    """Codes of a matrix [n, columns], and the matrix."""

    def __init__(self, bits: int, n: int, columns: int, group: int) -> None:
        generator = torch.Generator().manual_seed(bits * n + columns)
        groups = columns // group
        self.bits = bits
        self.codes = torch.randint(0, 2**bits, (n, columns), dtype=torch.uint8, generator=generator)
        self.scale = torch.rand(n, groups, generator=generator).bfloat16().float()
        self.low = torch.randn(n, groups, generator=generator).bfloat16().float()
        self.weight = (self.codes.view(n, groups, -1) * self.scale[..., None] + self.low[..., None]).view(n, columns)

    def packed(self, layout: type[LowBitOutputs] | type[LowBitInputs]) -> tuple[LowBitOutputs | LowBitInputs, Tensor]:
        """The copy, and the matrix M of its product x @ M."""
        made = layout.of(self.codes, self.scale, self.low, self.bits)
        return made, self.weight.t() if layout is LowBitOutputs else self.weight


def rows(n: int, width: int) -> Tensor:
    return torch.randn(n, width, generator=torch.Generator().manual_seed(width))


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(("n", "columns", "group"), SHAPES)
def test_unpacked_it_is_the_same_bits(bits: int, layout, n: int, columns: int, group: int) -> None:
    packed, matrix = Case(bits, n, columns, group).packed(layout)
    assert torch.equal(packed.matrix(), matrix)


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(("n", "columns", "group"), SHAPES)
def test_the_product_is_that_of_the_matrix_up_to_rounding(bits: int, layout, n: int, columns: int, group: int) -> None:
    packed, matrix = Case(bits, n, columns, group).packed(layout)
    x = rows(2, len(matrix))
    exact = x.double() @ matrix.double()
    assert float((packed.multiply(x) - exact).abs().max() / exact.abs().max()) < 2e-6


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_row_does_not_depend_on_its_neighbour(layout) -> None:
    packed, matrix = Case(3, 96, 576, 64).packed(layout)
    x = rows(2, len(matrix))
    assert torch.equal(packed.multiply(x)[1:], packed.multiply(x[1:]))


@pytest.mark.parametrize("share", [0.0, 0.01, 0.5])
def test_inputs_that_are_zero_are_not_read(share: float) -> None:
    case = Case(3, 96, 576, 64)
    x = rows(1, 96) * (torch.rand(1, 96, generator=torch.Generator().manual_seed(4)) < share)
    exact = x.double() @ case.weight.double()
    case.scale[x[0] == 0] = torch.nan
    packed, _ = case.packed(LowBitInputs)
    torch.testing.assert_close(packed.multiply(x).double(), exact, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_an_input_that_is_no_number_shows_in_its_row_alone(layout) -> None:
    packed, matrix = Case(3, 96, 576, 64).packed(layout)
    x = rows(2, len(matrix))
    x[0, 3] = torch.nan
    y = packed.multiply(x)
    assert y[0].isnan().all()
    assert not y[1].isnan().any()


@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_number_of_threads_does_not_change_bits(layout) -> None:
    packed, matrix = Case(3, 5000, 4096, 64).packed(layout)
    x = rows(1, len(matrix))
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        alone = packed.multiply(x)
        torch.set_num_threads(3)
        assert torch.equal(packed.multiply(x), alone)
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize("bits", BITS)
def test_bits_per_weight_are_those_of_the_memory(bits: int) -> None:
    case = Case(bits, 160, 4096, 64)
    outputs, inputs = (case.packed(layout)[0] for layout in LAYOUTS)
    for packed, counted in (
        (outputs, LowBitOutputs.bits_per_weight(bits, 64)),
        (inputs, LowBitInputs.bits_per_weight(bits, 64, 4096)),
    ):
        memory = 8 * (packed.words.nbytes + packed.scales.nbytes) / case.weight.numel()
        # Records of inputs begin at cache lines.
        assert counted <= memory < counted + 64 * 8 / 4096


def test_every_format_is_compiled_once() -> None:
    for bits in BITS:
        for layout in LAYOUTS:
            packed, matrix = Case(bits, 96, 576, 64).packed(layout)
            packed.multiply(rows(1, len(matrix)))
    for function in (fields.spread, fields.multiply_fields, fields.sum_fields):
        assert len(function.signatures) == 1
