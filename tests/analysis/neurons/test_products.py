"""Products whose gradients go through whatever the weights are kept as."""

import pytest
import torch
from stored_weights import affine_4, symmetric_8
from torch import Tensor

from patchclamp_server.analysis.neurons import products
from patchclamp_server.analysis.neurons.products import DifferentiableProduct
from patchclamp_server.cpu.linear import Linear
from patchclamp_server.engine.exclusive import at_once

OUT, WIDTH, ROWS = 80, 96, 5
WEIGHTS = {
    "4-bit codes": affine_4(OUT, WIDTH),
    "8-bit codes": symmetric_8(OUT, WIDTH),
    "float32": torch.randn(OUT, WIDTH, generator=torch.Generator().manual_seed(3)),
    "bfloat16": torch.randn(OUT, WIDTH, generator=torch.Generator().manual_seed(3)).bfloat16(),
    "float16": torch.randn(OUT, WIDTH, generator=torch.Generator().manual_seed(3)).half(),
}
every_weight = pytest.mark.parametrize("weight", WEIGHTS.values(), ids=WEIGHTS.keys())


def random(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(1))


@pytest.fixture(params=[1 << 20, 4 * WIDTH * 32, 1], ids=["whole", "32 outputs", "16 outputs"])
def part(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> int:
    """Bytes of weights that are float32 at a time."""
    monkeypatch.setattr(products, "PART_BYTES", request.param)
    return int(request.param)


@every_weight
@pytest.mark.parametrize("input_major", [False, True])
@pytest.mark.parametrize("batch_invariant", [False, True])
def test_products_and_their_gradients_equal_those_of_the_matrix(
    weight: Tensor, input_major: bool, batch_invariant: bool, part: int
) -> None:
    bias = random(OUT).to(weight.dtype)
    invariant = batch_invariant and weight.dtype == torch.float32
    product = DifferentiableProduct(Linear(weight, bias, input_major=input_major, batch_invariant=invariant))
    x, gradient = random(ROWS, WIDTH).requires_grad_(), random(ROWS, OUT)
    y = product(x)
    exact = x.detach().double() @ weight.double().t() + bias.double()
    assert (y - exact).abs().max() <= 2e-6 * exact.abs().max()
    (found,) = torch.autograd.grad(y, x, gradient)
    expected = gradient.double() @ weight.double()
    assert (found - expected).abs().max() <= 2e-6 * expected.abs().max()
    assert (at_once(product.multiply_back_in_slices(gradient)) - expected).abs().max() <= 2e-6 * expected.abs().max()


@every_weight
def test_no_part_of_the_weights_is_larger_than_the_bound(weight: Tensor, part: int) -> None:
    product = DifferentiableProduct(Linear(weight, None, batch_invariant=False))
    parts = list(product.parts())
    assert [outputs.start for outputs, _ in parts[1:]] == [outputs.stop for outputs, _ in parts[:-1]]
    assert (parts[0][0].start, parts[-1][0].stop) == (0, OUT)
    assert all(own.nbytes <= max(part, 16 * 4 * WIDTH) for _, own in parts)
    torch.testing.assert_close(torch.cat([own for _, own in parts]), weight.float(), rtol=1e-5, atol=1e-6)
