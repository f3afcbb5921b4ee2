"""Layouts of a projection's weights."""

import torch
import torch.nn.functional as F

from patchclamp_server.model.linear import Linear


def test_an_input_major_projection_gives_the_same_product_from_one_copy() -> None:
    weight, x = torch.randn(48, 80, dtype=torch.bfloat16), torch.randn(5, 80, dtype=torch.bfloat16)
    linear = Linear(weight, None, input_major=True)
    assert linear.packed is None
    assert linear.weight is not None
    assert linear.weight.t().is_contiguous()
    torch.testing.assert_close(linear(x), F.linear(x, weight), rtol=2e-2, atol=2e-2)


def test_on_a_cpu_in_float32_the_packed_product_takes_its_place() -> None:
    weight, x = torch.randn(48, 80), torch.randn(5, 80)
    torch.testing.assert_close(Linear(weight, None, input_major=True)(x), F.linear(x, weight), rtol=1e-5, atol=1e-5)
