"""Bits of a row do not depend on the rows beside it, on how many there are, or on threads."""

from collections.abc import Callable, Iterator

import pytest
import torch
import torch.nn.functional as F
from stored_weights import affine_4, symmetric_8
from torch import Tensor

from patchclamp_server.cpu.activations import ACTIVATION_FUNCTIONS
from patchclamp_server.cpu.invariant import operators
from patchclamp_server.cpu.linear import Linear

ROWS = 40


def random(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape)))


@pytest.fixture(params=[1, 2])
def threads(request: pytest.FixtureRequest) -> Iterator[int]:
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


def assert_rows_alone(compute: Callable[[Tensor], Tensor], x: Tensor) -> None:
    """Each of the first and last n rows of x gives the bits that it gives alone."""
    alone = torch.cat([compute(row.clone()) for row in x.split(1)])
    for n in (*range(2, 26), len(x)):
        assert torch.equal(compute(x[:n].clone()), alone[:n]), n
        assert torch.equal(compute(x[-n:].clone()), alone[-n:]), n


@pytest.mark.parametrize("make", [affine_4, symmetric_8, random], ids=["4 bits", "8 bits", "float32"])
# One block of outputs, fewer than are computed side by side, no whole number of those, and two threads' work.
@pytest.mark.parametrize("shape", [(16, 32), (48, 96), (112, 64), (2048, 576)])
def test_products(make: Callable[..., Tensor], shape: tuple[int, int], threads: int) -> None:
    assert_rows_alone(Linear(make(*shape), random(shape[0]), batch_invariant=True), random(ROWS, shape[1]))


@pytest.mark.parametrize("shape", [(33, 70), (5, 7), (1, 3)])
def test_products_of_any_shape(shape: tuple[int, int]) -> None:
    linear, x = Linear(random(*shape), None, batch_invariant=True), random(ROWS, shape[1])
    assert_rows_alone(linear, x)
    torch.testing.assert_close(linear(x), F.linear(x, random(*shape)), rtol=1e-5, atol=1e-5)


def test_products_that_are_fastest_for_their_number_of_rows_do_differ() -> None:
    """What the others are there for: without them the product of one row is another one than that of three."""
    linear, x = Linear(random(2048, 576), None), random(ROWS, 576)
    assert not torch.equal(linear(x[:1]), linear(x[:3])[:1])


@pytest.mark.parametrize("width", [576, 70])
def test_norms(width: int, threads: int) -> None:
    weight, bias, x = random(width), random(width + 1)[:width], random(2 * ROWS, width)
    assert_rows_alone(lambda x: operators.rms_norm(x, weight, 1e-5), x)
    assert_rows_alone(lambda x: operators.layer_norm(x, weight, bias, 1e-5), x)
    torch.testing.assert_close(operators.rms_norm(x, weight, 1e-5), F.rms_norm(x, (width,), weight, 1e-5))
    layer = F.layer_norm(x, (width,), weight, bias, 1e-5)
    torch.testing.assert_close(operators.layer_norm(x, weight, bias, 1e-5), layer, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("name", ACTIVATION_FUNCTIONS)
def test_activations(name: str, gated: bool, threads: int) -> None:
    x = 4 * random(ROWS, 1000)
    assert_rows_alone(lambda x: operators.activate(x, name, gated=gated), x)
    function = ACTIVATION_FUNCTIONS[name]
    exact = function(x[:, :500].double()) * x[:, 500:] if gated else function(x.double())
    torch.testing.assert_close(operators.activate(x, name, gated=gated).double(), exact, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", ACTIVATION_FUNCTIONS)
def test_what_is_no_number_or_infinite_is_no_number_in_an_activation(name: str) -> None:
    assert operators.activate(torch.tensor([[torch.nan, 1.0]]), name, gated=False).isnan().tolist() == [[True, False]]
    assert not operators.activate(torch.tensor([[torch.inf, 1.0]]), name, gated=False).isfinite().all()


@pytest.mark.parametrize("rotary", [0, 16, 64])
def test_heads(rotary: int, threads: int) -> None:
    cos, sin = random(ROWS, rotary), random(ROWS, rotary + 1)[:, :rotary].contiguous()

    def heads(x: Tensor) -> Tensor:
        # Which row it is, in its first number, says how far it turns.
        rows = x[:, 0].long() % ROWS
        qkv = x[:, 1:].clone().view(len(x), 12, 64)
        operators.finish_heads(qkv, 9, random(9, 64), 1e-6, (cos[rows], sin[rows]) if rotary else None)
        return qkv.flatten(1)

    x = torch.cat((torch.arange(ROWS)[:, None], random(ROWS, 12 * 64)), dim=1)
    assert_rows_alone(heads, x)


def test_a_soft_cap(threads: int) -> None:
    x = 50 * random(ROWS, 1003)
    assert_rows_alone(lambda x: operators.cap_softly(x, 30.0), x)
    exact = torch.tanh(x.double() / 30) * 30
    torch.testing.assert_close(operators.cap_softly(x.clone(), 30.0).double(), exact, rtol=1e-6, atol=1e-5)


def test_norms_of_any_number_of_dimensions_are_over_the_last() -> None:
    weight, bias, x = random(64), random(65)[:64], random(3, 5, 64)
    torch.testing.assert_close(operators.rms_norm(x, weight, 1e-5), F.rms_norm(x, (64,), weight, 1e-5))
    layer = F.layer_norm(x, (64,), weight, bias, 1e-5)
    torch.testing.assert_close(operators.layer_norm(x, weight, bias, 1e-5), layer, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("shape", [(96,), (2, 3, 96), (3, 80)])
def test_a_product_of_what_is_not_rows_of_its_width_is_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises((AssertionError, IndexError)):
        Linear(random(48, 96), None, batch_invariant=True)(random(*shape))
