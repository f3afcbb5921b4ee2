"""Layouts of a projection's weights, and its products of few and of many rows."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from patchclamp_server.cpu.linear import Linear


def random(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape))).to(dtype)


def assert_close(found: Tensor, weight: Tensor, x: Tensor, bias: Tensor | None = None) -> None:
    exact = F.linear(x.double(), weight.double(), None if bias is None else bias.double())
    tolerance = 2e-2 if weight.dtype == torch.bfloat16 else 1e-5
    assert found.dtype == weight.dtype
    torch.testing.assert_close(found.double(), exact, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_an_input_major_projection_has_one_copy_besides_the_packed_one(dtype: torch.dtype) -> None:
    linear = Linear(random(48, 80, dtype=dtype), None, input_major=True)
    assert (linear.packed is None) == (dtype == torch.bfloat16)
    assert linear.weight is not None
    assert linear.weight.t().is_contiguous()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("input_major", [False, True])
@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("rows", [1, 2, 5])
@pytest.mark.parametrize(("out", "width"), [(48, 80), (5, 7), (33, 70), (1, 64)])
def test_any_number_of_rows_is_the_product(
    dtype: torch.dtype, input_major: bool, biased: bool, rows: int, out: int, width: int
) -> None:
    weight, x = random(out, width, dtype=dtype), random(rows, width, dtype=dtype)
    bias = random(out, dtype=dtype) if biased else None
    assert_close(Linear(weight, bias, input_major=input_major)(x), weight, x, bias)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("input_major", [False, True])
@pytest.mark.parametrize("rows", [2, 5])
def test_a_row_does_not_depend_on_its_neighbours(dtype: torch.dtype, input_major: bool, rows: int) -> None:
    linear = Linear(random(48, 80, dtype=dtype), None, input_major=input_major)
    x = random(rows, 80, dtype=dtype)
    others = x.clone()
    others[1:] = torch.nan
    assert torch.equal(linear(x)[0], linear(others)[0])


@pytest.mark.parametrize("input_major", [False, True])
def test_one_row_of_a_large_matrix_is_the_same_bits_on_any_number_of_threads(input_major: bool) -> None:
    linear, x = Linear(random(1500, 1000), None, input_major=input_major), random(1, 1000)
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        alone = linear(x)
        torch.set_num_threads(3)
        assert torch.equal(linear(x), alone)
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("input_major", [False, True])
def test_one_row_reads_the_projection_itself_and_no_copy_of_it(dtype: torch.dtype, input_major: bool) -> None:
    linear, x = Linear(random(48, 80, dtype=dtype), None, input_major=input_major), random(1, 80, dtype=dtype)
    assert linear.weight is not None
    assert linear(x).any()
    linear.weight.zero_()
    assert not linear(x).any()
