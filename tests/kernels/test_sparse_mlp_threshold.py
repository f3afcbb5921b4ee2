"""sparse_mlp: linear layers that skip input channels by a threshold, against a mask in float64."""

from typing import Any

import pytest
import torch
from guards import Guarded, guard
from scratch import guarded_scratch
from torch import Tensor

from patchclamp_kernels.configs import Config
from patchclamp_kernels.runtime import reference_only
from patchclamp_kernels.sparse_mlp import sparse_linear, sparse_linear_reference

TOLERANCE = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1.6e-2}
DTYPES = list(TOLERANCE)
# Several splits of several tiles of channels, the last of each incomplete; by whether there is one row.
SMALL = {
    True: Config({"BLOCK_J": 8, "BLOCK_C": 32, "PROGRAMS": 9, "STAGES": 1}),
    False: Config({"BLOCK_J": 16, "BLOCK_C": 32, "PROGRAMS": 9}),
}


def layer(rows: int, inputs: int, outputs: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    g = torch.Generator().manual_seed(rows + inputs)
    weight = torch.randn(inputs, outputs, generator=g) / inputs**0.5
    return torch.randn(rows, inputs, generator=g).to(dtype), weight.to(dtype)


def run(x: Tensor, weight: Tensor, *, small: bool = True, **how: Any) -> Tensor:
    out = Guarded((x.shape[0], weight.shape[1]), x.dtype)
    config = SMALL[len(x) == 1] if small else None
    with guarded_scratch():
        y = sparse_linear(guard(x).tensor, guard(weight).tensor, out=out.tensor, config=config, **how)
    assert y is out.tensor
    out.assert_margins_intact()
    return y


def assert_agrees(x: Tensor, weight: Tensor, **how: Any) -> None:
    small = {"small": how.pop("small")} if "small" in how else {}
    upcast = {**how, "bias": how["bias"].double()} if how.get("bias") is not None else how
    want = sparse_linear_reference(x.double(), weight.double(), **upcast)
    limit = TOLERANCE[x.dtype] * max(1.0, want.abs().max().item())
    torch.testing.assert_close(run(x, weight, **how, **small).double(), want, rtol=0, atol=limit)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("rows", "inputs", "outputs"), [(1, 100, 72), (2, 72, 100), (17, 100, 33), (32, 31, 40)])
def test_channels_above_the_threshold_make_the_output(rows: int, inputs: int, outputs: int, dtype: torch.dtype) -> None:
    x, weight = layer(rows, inputs, outputs, dtype)
    for small in (True, False):
        assert_agrees(x, weight, threshold=0.7, small=small)


@pytest.mark.parametrize("rows", [1, 4])
def test_scale_bias_and_a_threshold_of_each_row(rows: int) -> None:
    x, weight = layer(rows, 100, 72)
    thresholds, scale, bias = torch.linspace(0.4, 1.2, rows), torch.rand(100) + 0.5, torch.randn(72)
    assert_agrees(x, weight, threshold=thresholds)
    assert_agrees(x, weight, threshold=0.7, channel_scale=scale)
    assert_agrees(x, weight, threshold=0.7, bias=bias)
    assert_agrees(x, weight, threshold=thresholds, channel_scale=scale, bias=bias)


@pytest.mark.parametrize("rows", [1, 3])
def test_wina_asks_the_input_times_the_norm_of_its_weights(rows: int) -> None:
    x, weight = layer(rows, 60, 40)
    weight *= torch.logspace(-1, 1, 60)[:, None]
    norms = weight.norm(dim=1)
    kept = x.abs() * norms >= 1.0
    want = (x * kept).double() @ weight.double()
    torch.testing.assert_close(run(x, weight, threshold=1.0, channel_scale=norms).double(), want, rtol=0, atol=1e-4)


@pytest.mark.parametrize("rows", [1, 3])
def test_a_threshold_of_zero_is_the_dense_layer(rows: int) -> None:
    x, weight = layer(rows, 100, 72)
    torch.testing.assert_close(run(x, weight, threshold=0.0).double(), x.double() @ weight.double(), rtol=0, atol=1e-5)


@pytest.mark.parametrize("rows", [1, 3])
def test_a_threshold_that_keeps_nothing_gives_the_bias_alone(rows: int) -> None:
    x, weight = layer(rows, 100, 72)
    bias = torch.randn(72)
    assert torch.equal(run(x, weight, threshold=1e9), torch.zeros(rows, 72))
    assert torch.equal(run(x, weight, threshold=1e9, bias=bias), bias.expand(rows, 72))


@pytest.mark.parametrize("rows", [1, 3])
def test_a_score_equal_to_the_threshold_is_kept(rows: int) -> None:
    x = torch.tensor([[0.5, -0.5, 0.4999, 1.0]]).repeat(rows, 1)
    assert torch.equal(run(x, torch.eye(4), threshold=0.5), torch.tensor([[0.5, -0.5, 0.0, 1.0]]).expand(rows, 4))


@pytest.mark.parametrize("rows", [1, 6])
def test_the_weights_of_a_channel_that_no_row_keeps_are_not_read(rows: int) -> None:
    x, weight = layer(rows, 100, 72)
    x[:, ::3] *= 0.01
    want = run(x, weight, threshold=0.7)
    weight[(x.abs() < 0.7).all(dim=0)] = float("nan")
    assert weight.isnan().any()
    assert torch.equal(run(x, weight, threshold=0.7), want)


@pytest.mark.parametrize("rows", [1, 3])
def test_an_input_that_is_nan_shows(rows: int) -> None:
    x, weight = layer(rows, 100, 72)
    x[0, 5] = float("nan")
    y = run(x, weight, threshold=0.7)
    assert y[0].isnan().all()
    assert not y[1:].isnan().any()


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_row_alone_agrees_with_the_row_in_a_batch(dtype: torch.dtype) -> None:
    x, weight = layer(3, 60, 40, dtype)
    together = run(x, weight, threshold=0.7)
    for b in range(3):
        alone = run(x[b : b + 1], weight, threshold=0.7)[0]
        torch.testing.assert_close(alone.float(), together[b].float(), rtol=0, atol=4 * TOLERANCE[dtype])


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_bits_of_a_row_do_not_depend_on_its_neighbours(dtype: torch.dtype) -> None:
    x, weight = layer(20, 60, 40, dtype)
    pair = torch.tensor([13, 4])
    assert torch.equal(run(x[pair], weight, threshold=0.7), run(x, weight, threshold=0.7)[pair])


@pytest.mark.parametrize("rows", [1, 7])
def test_the_same_batch_twice_has_the_same_bits(rows: int) -> None:
    x, weight = layer(rows, 60, 40, torch.bfloat16)
    assert torch.equal(run(x, weight, threshold=0.7), run(x, weight, threshold=0.7))


@pytest.mark.parametrize(("rows", "inputs", "outputs"), [(0, 8, 8), (3, 0, 8), (1, 0, 8), (3, 8, 0)])
def test_sizes_of_zero_are_fine(rows: int, inputs: int, outputs: int) -> None:
    assert torch.equal(run(*layer(rows, inputs or 1, outputs), threshold=9.0)[:0], torch.zeros(0, outputs))
    y = run(torch.zeros(rows, inputs), torch.zeros(inputs, outputs), threshold=0.0)
    assert torch.equal(y, torch.zeros(rows, outputs))


def test_the_reference_takes_the_same_arguments() -> None:
    x, weight = layer(3, 100, 72)
    how: dict[str, Any] = {"threshold": torch.tensor([0.1, 0.7, 2.0]), "channel_scale": torch.rand(100)}
    with reference_only():
        want = run(x, weight, **how)
    torch.testing.assert_close(run(x, weight, **how), want, rtol=0, atol=1e-5)


@pytest.mark.parametrize("seed", range(12))
def test_random_layers_agree_with_float64(seed: int) -> None:
    g = torch.Generator().manual_seed(seed)

    def pick(*values: Any) -> Any:
        return values[int(torch.randint(len(values), (), generator=g))]

    x, weight = layer(pick(1, 1, 2, 16, 19, 32), pick(5, 32, 100, 200), pick(1, 33, 72), pick(*DTYPES))
    how: dict[str, Any] = {"threshold": pick(0.0, 0.3, 0.7, 2.0), "small": pick(True, False)}
    if pick(True, False):
        how["channel_scale"] = torch.rand(x.shape[1], generator=g) * 2
    if pick(True, False):
        how["bias"] = torch.randn(weight.shape[1], generator=g).to(x.dtype)
    if pick(True, False):
        how["threshold"] = torch.rand(x.shape[0], generator=g)
    assert_agrees(x, weight, **how)


BAD: dict[str, Any] = {
    "x": torch.zeros(40),
    "weight_in_major": torch.zeros(41, 24),
    "threshold": torch.zeros(3),
    "channel_scale": torch.zeros(40, dtype=torch.float16),
    "bias": torch.zeros(40),
    "out": torch.zeros(2, 40),
}


@pytest.mark.parametrize("name", list(BAD))
def test_a_wrong_argument_is_refused_by_name(name: str) -> None:
    good: dict[str, Any] = {"x": torch.zeros(2, 40), "weight_in_major": torch.zeros(40, 24), "threshold": 0.5}
    with pytest.raises(ValueError, match=name):
        sparse_linear(**{**good, name: BAD[name]})
