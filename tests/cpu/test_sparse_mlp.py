"""MLPs and projections that read active rows only, against the formula in float64."""

from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from stored_weights import affine_4, symmetric_8
from torch import Tensor

from patchclamp_server.cpu.linear import Linear
from patchclamp_server.cpu.sparse import kernels
from patchclamp_server.cpu.sparse.channels import SparseLinear
from patchclamp_server.cpu.sparse.mlp import SparseMlp

ACTIVATIONS: dict[str, Any] = {
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "relu": F.relu,
}


def floats(out: int, width: int) -> Tensor:
    return torch.randn(out, width, generator=torch.Generator().manual_seed(out)) / width**0.5


def bfloats(out: int, width: int) -> Tensor:
    return floats(out, width).bfloat16()


# Formats and shapes (d_model, d_ff) each can have; codes need whole groups and lanes.
CASES = [
    (floats, 5, 3),
    (floats, 33, 70),
    (floats, 64, 129),
    (bfloats, 33, 70),
    (affine_4, 32, 32),
    (affine_4, 96, 160),
    (symmetric_8, 96, 160),
]


class Case:
    """An MLP, its matrices and an input."""

    def __init__(
        self, make: Any, d: int, d_ff: int, activation: str = "silu", gated: bool = True, biased: bool = False
    ):
        self.input = make(d_ff * 2 if gated else d_ff, d)
        self.output = make(d, d_ff)
        dtype = self.input.dtype
        self.input_bias = torch.randn(self.input.shape[0]).to(dtype) if biased else None
        self.output_bias = torch.randn(d).to(dtype) if biased else None
        self.gated, self.activation, self.d_ff = gated, activation, d_ff
        linears = Linear(self.input, self.input_bias), Linear(self.output, self.output_bias, input_major=True)
        self.mlp = SparseMlp(*linears, activation, gated=gated)
        self.x = torch.randn(2, d, generator=torch.Generator().manual_seed(9)).to(dtype)

    def formula(self, index: Tensor) -> Tensor:
        z = self.x.double() @ self.input.double().t()
        if self.input_bias is not None:
            z += self.input_bias.double()
        act = ACTIVATIONS[self.activation]
        h = act(z[:, : self.d_ff]) * z[:, self.d_ff :] if self.gated else act(z)
        y = h[:, index] @ self.output.double()[:, index].t()
        return y if self.output_bias is None else y + self.output_bias.double()

    def results(self, index: Tensor) -> dict[str, Tensor]:
        """By every way there is."""
        found = {"gathered": self.mlp(self.x, index), "compact": self.mlp.compact(index)(self.x)}
        if self.gated:
            found["gate first"] = self.mlp.output(self.mlp.neurons(self.x, index, self.mlp.gate(self.x)), index)
        return found


def index_of(n: int, k: int) -> Tensor:
    return torch.randperm(n, generator=torch.Generator().manual_seed(k))[:k].sort().values


def assert_close(found: Tensor, exact: Tensor) -> None:
    tolerance = 2e-2 if found.dtype == torch.bfloat16 else 1e-5
    assert (found.double() - exact).abs().max() <= tolerance * exact.abs().max().clamp_min(1e-3)


@pytest.mark.parametrize(("make", "d", "d_ff"), CASES)
@pytest.mark.parametrize("share", [0.0, 0.3, 0.5, 0.9])
def test_a_set_of_any_size_equals_the_formula(make: Any, d: int, d_ff: int, share: float) -> None:
    case = Case(make, d, d_ff)
    index = index_of(d_ff, int(share * d_ff))
    for found in case.results(index).values():
        assert found.dtype == case.x.dtype
        assert_close(found, case.formula(index))


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("make", [floats, affine_4])
def test_every_activation_gated_or_not_with_biases(make: Any, activation: str, gated: bool) -> None:
    case = Case(make, 64, 96, activation, gated, biased=True)
    index = index_of(96, 41)
    for found in case.results(index).values():
        assert_close(found, case.formula(index))


@pytest.mark.parametrize(("make", "d", "d_ff"), CASES)
def test_one_neuron_alone(make: Any, d: int, d_ff: int) -> None:
    case = Case(make, d, d_ff)
    for neuron in (0, d_ff - 1):
        index = torch.tensor([neuron])
        for found in case.results(index).values():
            assert_close(found, case.formula(index))


@pytest.mark.parametrize("make", [floats, affine_4])
def test_no_neuron_leaves_the_bias(make: Any) -> None:
    case = Case(make, 32, 64, biased=True)
    assert case.output_bias is not None
    for found in case.results(torch.empty(0, dtype=torch.int64)).values():
        torch.testing.assert_close(found, case.output_bias.expand(2, -1))


@pytest.mark.parametrize(("make", "d", "d_ff"), CASES)
@pytest.mark.parametrize("gated", [False, True])
def test_all_neurons_are_the_dense_path_bit_by_bit(make: Any, d: int, d_ff: int, gated: bool) -> None:
    case = Case(make, d, d_ff, gated=gated)
    dense = case.mlp.mlp_output(case.mlp.dense_neurons(case.x))
    for found in case.results(torch.arange(d_ff)).values():
        assert torch.equal(found, dense)


@pytest.mark.parametrize("index", [[3, 3], [5, 2], [-1, 2], [2, 96]])
def test_what_is_not_a_set_is_refused(index: list[int]) -> None:
    case = Case(floats, 32, 96)
    with pytest.raises(ValueError, match="index"):
        case.mlp(case.x, torch.tensor(index))
    with pytest.raises(ValueError, match="index"):
        case.mlp.compact(torch.tensor(index))


def test_weights_of_inactive_neurons_do_not_matter_even_if_they_are_no_numbers() -> None:
    case = Case(floats, 33, 70)
    index = index_of(70, 30)
    exact = case.formula(index)
    others = [j for j in range(70) if j not in index.tolist()]
    case.input[others] = torch.nan
    case.input[[j + 70 for j in others]] = torch.inf
    case.output[:, others] = torch.nan
    poisoned = SparseMlp(Linear(case.input, None), Linear(case.output, None), "silu", gated=True)
    for found in (poisoned(case.x, index), poisoned.compact(index)(case.x)):
        assert_close(found, exact)


@pytest.mark.parametrize("make", [floats, affine_4])
def test_weights_of_active_neurons_that_are_no_numbers_show(make: Any) -> None:
    case = Case(make, 32, 64)
    case.x[0, 3] = torch.nan
    for found in case.results(index_of(64, 30)).values():
        assert found[0].isnan().all()
        assert not found[1].isnan().any()


@pytest.mark.parametrize(("make", "d", "d_ff"), CASES)
def test_a_row_does_not_depend_on_its_neighbour(make: Any, d: int, d_ff: int) -> None:
    case = Case(make, d, d_ff)
    index = index_of(d_ff, d_ff // 2)
    for compute in (lambda x: case.mlp(x, index), case.mlp.compact(index)):
        assert torch.equal(compute(case.x)[1:], compute(case.x[1:]))


@pytest.mark.parametrize("make", [floats, affine_4])
def test_neurons_can_be_edited_between_the_products(make: Any) -> None:
    case = Case(make, 32, 64)
    index = index_of(64, 20)
    compact = case.mlp.compact(index)
    h = case.mlp.neurons(case.x, index)
    h[:, 7] = 3.0
    full = torch.zeros(2, 64, dtype=torch.float64)
    full[:, index] = h.double()
    for found in (case.mlp.output(h, index), compact.output(h)):
        assert_close(found, full @ case.output.double().t())


@pytest.mark.parametrize("make", [floats, bfloats])
def test_the_number_of_threads_does_not_change_bits(make: Any) -> None:
    case = Case(make, 1000, 3001)
    index = index_of(3001, 2500)  # enough bytes that a second thread is woken
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        alone = case.mlp(case.x, index)
        torch.set_num_threads(3)
        assert torch.equal(case.mlp(case.x, index), alone)
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize(("make", "out", "width"), [(floats, 33, 70), (bfloats, 40, 33), (affine_4, 48, 96)])
@pytest.mark.parametrize("scaled", [False, True])
def test_channels_below_the_threshold_are_left_out(make: Any, out: int, width: int, scaled: bool) -> None:
    weight = make(out, width)
    bias = torch.randn(out).to(weight.dtype)
    x = torch.randn(2, width).to(weight.dtype)
    scale = weight.float().norm(dim=0) if scaled else None
    score = x.float().abs() if scale is None else x.float().abs() * scale
    threshold = float(score.median())
    found = SparseLinear(Linear(weight, bias))(x, threshold, scale)
    kept = torch.where(score < np.float32(threshold), 0.0, x.double())
    assert_close(found, kept @ weight.double().t() + bias.double())


@pytest.mark.parametrize("make", [floats, affine_4])
def test_thresholds_that_keep_no_channel_and_all(make: Any) -> None:
    linear = Linear(make(48, 96), torch.randn(48))
    sparse = SparseLinear(linear)
    x = torch.randn(1, 96)
    assert linear.bias is not None
    assert torch.equal(sparse(x, torch.inf), linear.bias[None])
    assert torch.equal(sparse(x, 0.0), linear(x))


def test_everything_a_request_runs_is_compiled_by_the_warm_up() -> None:
    case = Case(affine_4, 96, 160)
    case.mlp.warm_up()
    sparse = SparseLinear(Linear(case.output, None))
    sparse.warm_up()
    compiled = specialisations()
    case.results(index_of(160, 50))
    sparse(torch.randn(1, 160), 0.5, torch.ones(160))
    assert specialisations() == compiled


def specialisations() -> dict[str, int]:
    """How many of each compiled function there are."""
    functions = {name: f for name, f in vars(kernels).items() if hasattr(f, "signatures")}
    return {name: len(f.signatures) for name, f in functions.items()}
