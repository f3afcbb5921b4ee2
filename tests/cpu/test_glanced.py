"""Products of a glance: the choice of the largest, sums over what was kept, and codes for 8-bit activations."""

import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType, quantize
from numpy.typing import NDArray

from patchclamp_server.cpu.linear import Linear
from patchclamp_server.cpu.products import StoredProduct
from patchclamp_server.cpu.sparse.codes import codes_of
from patchclamp_server.cpu.sparse.glanced import GlancedCodes
from patchclamp_server.cpu.sparse.glanced_mlp import GlancedMlp
from patchclamp_server.cpu.sparse.kept import KeptInputs, keep_largest
from patchclamp_server.cpu.sparse.preview import CANDIDATES, Preview
from patchclamp_server.cpu.stored import Format, Part, StoredMatrix

Floats = NDArray[np.float32]
NONE = np.empty(0, dtype=np.uint8)
FOUR_BITS = [Format.Q4_0, Format.Q4_1]


def part(format: Format, out: int, width: int, seed: int = 0) -> Part:
    weight = np.random.default_rng(seed).standard_normal((out, width)).astype(np.float32)
    blocks = quantize(weight, GGMLQuantizationType(format))
    return Part.whole(format, np.ascontiguousarray(blocks).reshape(-1), width)


def rows(n: int, width: int) -> Floats:
    return (np.random.default_rng(1).standard_normal((n, width)) ** 3).astype(np.float32)


def rounded(x: Floats) -> Floats:
    """In 8 bits by groups of 32."""
    groups = x.reshape(len(x), -1, 32)
    step = np.abs(groups).max(axis=2, keepdims=True) / np.float32(127)
    q = np.rint(groups / np.where(step == 0, np.float32(1), step))
    return np.asarray(q * step, dtype=np.float32).reshape(x.shape)


def chosen(h: Floats, norms: Floats, k: int, forced: NDArray[np.uint8] = NONE) -> tuple[Floats, int]:
    own = h.copy()
    kept = keep_largest(own, norms, k, forced, np.zeros(-(-len(h) // 16) * 16, dtype=np.int32))
    return own, kept


@pytest.mark.parametrize("n", [5, 16, 37, 160])
@pytest.mark.parametrize("share", [0.0, 0.3, 0.5, 1.0])
def test_exactly_the_k_that_add_most_are_kept(n: int, share: float) -> None:
    h, norms, k = rows(1, n)[0], np.abs(rows(2, n)[1]) + np.float32(0.1), round(share * n)
    own, kept = chosen(h, norms, k)
    largest = np.argsort(-np.abs(h * norms), kind="stable")[:k]
    expected = np.zeros_like(h)
    expected[largest] = h[largest]
    assert kept == k
    assert np.array_equal(own, expected)


def test_of_equal_ones_the_first_are_kept() -> None:
    own, kept = chosen(np.array([1, 2, -2, 2, 2, 0], dtype=np.float32), np.ones(6, dtype=np.float32), 3)
    assert own.tolist() == [0, 2, -2, 2, 0, 0]
    assert kept == 3


def test_forced_neurons_are_kept_besides_the_k() -> None:
    forced = np.array([0, 0, 0, 1, 1], dtype=np.uint8)
    own, kept = chosen(np.array([5, 4, 3, 2, 5], dtype=np.float32), np.ones(5, dtype=np.float32), 2, forced)
    assert own.tolist() == [5, 0, 0, 2, 5]
    assert kept == 3


def test_nan_is_kept_so_that_the_step_can_say_so() -> None:
    own, _ = chosen(np.array([1, np.nan, 3, 2], dtype=np.float32), np.ones(4, dtype=np.float32), 2)
    assert np.isnan(own[1])
    assert own[2] == 3
    assert own[0] == own[3] == 0


@pytest.mark.parametrize("format", FOUR_BITS)
@pytest.mark.parametrize("share", [0.0, 0.1, 1.0])
@pytest.mark.parametrize("out", [64, 72, 130])
def test_a_sum_over_what_is_not_zero_is_the_product_of_what_was_rounded(format: Format, share: float, out: int) -> None:
    weights, h = part(format, out, 160), rows(3, 160)
    h[np.random.default_rng(2).random(h.shape) >= share] = 0
    codes = codes_of(weights)
    assert codes is not None
    kept = KeptInputs.of(codes)
    assert kept is not None
    expected = rounded(h).astype(np.float64) @ weights.dense().astype(np.float64).T
    assert np.abs(kept.sum(h) - expected).max() <= 1e-5 * max(1.0, np.abs(expected).max())


def test_a_neuron_that_is_infinite_makes_its_row_nan_and_no_other() -> None:
    weights, h = part(Format.Q4_1, 64, 96), rows(2, 96)
    h[0, 40] = np.inf
    codes = codes_of(weights)
    assert codes is not None
    kept = KeptInputs.of(codes)
    assert kept is not None
    y = kept.sum(h)
    assert np.isnan(y[0]).all()
    assert np.isfinite(y[1]).all()


@pytest.mark.parametrize("format", [Format.Q5_0, Format.Q8_0])
def test_other_codes_have_no_copy(format: Format) -> None:
    codes = codes_of(part(format, 32, 256))
    assert codes is not None
    assert KeptInputs.of(codes) is None
    assert GlancedCodes.of([codes]) is None


@pytest.mark.parametrize("n", [1, 2, 3, 8, 11])
@pytest.mark.parametrize("formats", [(Format.Q4_1, Format.Q4_1), (Format.Q4_0, Format.Q4_1)])
def test_the_copy_for_8_bits_gives_the_bits_of_the_codes_as_they_are_stored(
    n: int, formats: tuple[Format, Format]
) -> None:
    parts = tuple(part(format, 24, 96, seed) for seed, format in enumerate(formats))
    product, x = StoredProduct(StoredMatrix(parts), rounds=True), torch.from_numpy(rows(n, 96))
    tiles = GlancedCodes.of([codes_of(each) for each in parts])
    assert tiles is not None
    y = tiles.multiply(product.rounded(x)).numpy()
    if formats[0] is formats[1]:
        assert np.array_equal(y, product.multiply(x).numpy())
    else:
        # Codes of Q4_0 have a low of their own here, and are shifted there.
        np.testing.assert_allclose(y, product.multiply(x).numpy(), rtol=1e-5, atol=1e-5)


def test_weights_without_codes_have_no_glance() -> None:
    floats = Linear(torch.randn(32, 32), None, batch_invariant=True)
    codes = Linear(StoredMatrix((part(Format.Q4_1, 32, 32),)), None, batch_invariant=True)
    assert GlancedMlp.of(floats, codes) is None
    assert GlancedMlp.of(codes, floats) is None
    assert GlancedMlp.of(codes, codes) is not None


def preview_of(format: Format, out: int = 2064, biased: bool = False) -> tuple[Linear, Preview]:
    bias = torch.linspace(-1, 1, out) if biased else None
    linear = Linear(StoredMatrix((part(format, out, 64),)), bias, batch_invariant=True)
    preview = Preview.of(linear)
    assert preview is not None
    return linear, preview


@pytest.mark.parametrize("biased", [False, True])
def test_the_largest_of_a_preview_are_computed_as_they_are(biased: bool) -> None:
    linear, preview = preview_of(Format.Q8_0, biased=biased)
    x = torch.from_numpy(rows(3, 64))
    exact, blurred = linear(x), torch.randn(3, 2064, generator=torch.Generator().manual_seed(0)) * 5
    seen = blurred.clone()
    preview.refine(x, seen)
    for own, before, true in zip(seen, blurred, exact, strict=True):
        largest = before.topk(CANDIDATES).indices
        others = torch.ones(2064, dtype=torch.bool)
        others[largest] = False
        assert torch.equal(own[largest], true[largest])
        assert torch.equal(own[others], before[others])


def test_a_preview_sees_every_output_to_within_its_codes() -> None:
    linear, preview = preview_of(Format.Q8_0)
    x = torch.from_numpy(rows(4, 64))
    records = StoredProduct(StoredMatrix((part(Format.Q8_0, 16, 64),)), rounds=True).rounded(x)
    error = preview.tiles.multiply(records) - linear(x)
    assert error.std() < 0.15 * linear(x).std()


def test_of_equal_values_there_are_no_more_candidates_than_asked_for() -> None:
    _, preview = preview_of(Format.Q8_0)
    y = torch.zeros(1, 2064)
    y[0, 500] = -1.0
    preview.refine(torch.from_numpy(rows(1, 64)), y)
    assert int((y[0] != 0).sum()) == CANDIDATES + 1


@pytest.mark.parametrize(("format", "out"), [(Format.Q4_1, 2064), (Format.Q8_0, 2065), (Format.Q8_0, 512)])
def test_there_is_no_preview_of_few_outputs_or_few_bits(format: Format, out: int) -> None:
    assert Preview.of(Linear(StoredMatrix((part(format, out, 64),)), None, batch_invariant=True)) is None
