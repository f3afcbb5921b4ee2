"""Quantisers against plain rounding between the least and the largest weight, and against what gguf reads of them."""

import tracemalloc

import numpy as np
import pytest
from gguf import GGMLQuantizationType, dequantize, quantize
from numpy.typing import NDArray

from patchclamp_server.cpu.quantize.matrix import QUANTIZERS, quantize_matrix
from patchclamp_server.cpu.quantize.q4_k import quantize_q4_k
from patchclamp_server.cpu.quantize.q6_k import quantize_q6_k
from patchclamp_server.cpu.stored import Format, Part, StoredMatrix

Rows = NDArray[np.float32]
K_FORMATS = (Format.Q4_K, Format.Q6_K)


def gaussian(seed: int = 0) -> Rows:
    return np.random.default_rng(seed).normal(0, 0.02, (16, 1024)).astype(np.float32)


def heavy_tailed(seed: int = 0) -> Rows:
    return (0.02 * np.random.default_rng(seed).standard_t(3, (16, 1024))).astype(np.float32)


def shifted(seed: int = 0) -> Rows:
    return gaussian(seed) + np.float32(0.05)


def read(blocks: NDArray[np.uint8], format: Format) -> Rows:
    return np.asarray(dequantize(blocks, GGMLQuantizationType(format)), dtype=np.float32)


def stored(rows: Rows) -> StoredMatrix:
    return StoredMatrix((Part.whole(Format.F32, rows.reshape(-1).view(np.uint8), rows.shape[1]),))


def error(rows: Rows, of: Rows) -> float:
    return float(((rows - of) ** 2).sum() / (of**2).sum())


def rounded_between_extremes(rows: Rows, group: int, top: int, six_bits: bool) -> Rows:
    """The simplest quantiser with the numbers that the format has: codes by the range of a group, scales and minima
    rounded as the format rounds them."""
    x = rows.reshape(len(rows), -1, 256 // group, group)
    if six_bits:
        low = np.minimum(x.min(axis=3, keepdims=True), 0)
        scale = (x.max(axis=3, keepdims=True) - low) / top
        d = (scale.max(axis=2, keepdims=True) / 63).astype(np.float16).astype(np.float32)
        dmin = (-low.min(axis=2, keepdims=True) / 63).astype(np.float16).astype(np.float32)
        scale, low = d * np.rint(scale / d), -dmin * np.rint(-low / np.maximum(dmin, 1e-9))
        codes = np.clip(np.rint((x - low) / scale), 0, top)
    else:
        scale = np.abs(x).max(axis=3, keepdims=True) / (top // 2)
        d = (scale.max(axis=2, keepdims=True) / 127).astype(np.float16).astype(np.float32)
        scale, low = d * np.rint(scale / d), np.float32(0)
        codes = np.clip(np.rint(x / scale), -(top // 2) - 1, top // 2)
    return (scale * codes + low).reshape(rows.shape)


@pytest.mark.parametrize("rows", [gaussian(), heavy_tailed(), shifted()], ids=["gaussian", "heavy", "shifted"])
def test_q4_k_has_a_smaller_error_than_rounding_between_the_least_and_the_largest_weight(rows: Rows) -> None:
    plain = rounded_between_extremes(rows, 32, 15, six_bits=True)
    assert error(read(quantize_q4_k(rows), Format.Q4_K), rows) < 0.9 * error(plain, rows)


@pytest.mark.parametrize("rows", [gaussian(), heavy_tailed(), shifted()], ids=["gaussian", "heavy", "shifted"])
def test_q6_k_has_a_smaller_error_than_rounding_by_the_largest_weight(rows: Rows) -> None:
    plain = rounded_between_extremes(rows, 16, 63, six_bits=False)
    assert error(read(quantize_q6_k(rows), Format.Q6_K), rows) < 0.95 * error(plain, rows)


SMALL = (Format.Q4_0, Format.Q5_0, Format.Q4_1, Format.Q5_1)


@pytest.mark.parametrize("rows", [gaussian(), heavy_tailed()], ids=["gaussian", "heavy"])
@pytest.mark.parametrize("format", SMALL, ids=lambda format: format.name)
def test_small_blocks_have_a_smaller_error_than_by_their_extremes(format: Format, rows: Rows) -> None:
    plain = read(quantize(rows, GGMLQuantizationType(format)), format)
    assert error(read(QUANTIZERS[format](rows), format), rows) < error(plain, rows)


@pytest.mark.parametrize("format", SMALL, ids=lambda format: format.name)
def test_weights_that_small_blocks_represent_come_back_as_they_were(format: Format) -> None:
    bits, has_minimum = (4 if format in (Format.Q4_0, Format.Q4_1) else 5), format in (Format.Q4_1, Format.Q5_1)
    rng = np.random.default_rng(1)
    codes = rng.integers(0, 2**bits, (4, 8, 32))
    codes[..., 0], codes[..., 1] = 0, 2**bits - 1
    scale = np.float32(2**-10) * rng.integers(1, 9, (4, 8, 1))
    low = np.float32(2**-6) * rng.integers(-9, 9, (4, 8, 1)) if has_minimum else -(2 ** (bits - 1)) * scale
    rows = (scale * codes + low).astype(np.float32).reshape(4, 256)
    np.testing.assert_array_equal(read(QUANTIZERS[format](rows), format), rows)


def test_weights_that_q4_k_represents_come_back_as_they_were() -> None:
    rng = np.random.default_rng(1)
    codes = rng.integers(0, 16, (4, 2, 8, 32))
    codes[..., 0], codes[..., 1] = 0, 15
    scale, minimum = rng.integers(20, 64, (2, 4, 2, 8, 1))
    scale[:, :, 0], minimum[:, :, 3] = 63, 63
    rows = (np.float32(2**-12) * scale * codes - np.float32(2**-10) * minimum).astype(np.float32).reshape(4, 512)
    np.testing.assert_array_equal(read(quantize_q4_k(rows), Format.Q4_K), rows)


def test_weights_that_q6_k_represents_come_back_as_they_were() -> None:
    rng = np.random.default_rng(1)
    codes = rng.integers(-32, 32, (4, 2, 16, 16))
    codes[..., 0] = -32
    scale = rng.integers(-127, 128, (4, 2, 16, 1))
    scale[:, :, 0] = -128
    rows = (np.float32(2**-12) * scale * codes).astype(np.float32).reshape(4, 512)
    np.testing.assert_array_equal(read(quantize_q6_k(rows), Format.Q6_K), rows)


@pytest.mark.parametrize("format", list(QUANTIZERS), ids=lambda format: format.name)
def test_zeros_stay_zeros(format: Format) -> None:
    rows = np.zeros((2, 512), dtype=np.float32)
    np.testing.assert_array_equal(read(QUANTIZERS[format](rows), format), rows)


@pytest.mark.parametrize("format", list(QUANTIZERS), ids=lambda format: format.name)
@pytest.mark.parametrize("value", [0.5, -0.03])
def test_constant_rows_stay_constant_within_the_rounding_of_the_scale(format: Format, value: float) -> None:
    rows = np.full((2, 512), value, dtype=np.float32)
    found = read(QUANTIZERS[format](rows), format)
    assert np.ptp(found) == 0
    # Scales of Q6_K are 128 times as small as its groups': where weights are, float16 has few digits left.
    np.testing.assert_allclose(found, rows, rtol=2**-9 if format is Format.Q6_K else 2**-10)


@pytest.mark.parametrize("format", K_FORMATS, ids=lambda format: format.name)
def test_one_large_weight_costs_its_own_group_alone(format: Format) -> None:
    rows = gaussian()
    rows[:, 40] = 0.5
    far = np.delete(read(QUANTIZERS[format](rows), format), np.s_[32:64], axis=1)
    assert error(far, np.delete(rows, np.s_[32:64], axis=1)) < 0.06


@pytest.mark.parametrize("format", list(QUANTIZERS), ids=lambda format: format.name)
def test_the_error_of_a_matrix_is_that_of_what_gguf_reads(format: Format) -> None:
    rows = heavy_tailed(2)
    quantized = quantize_matrix(stored(rows), format)
    assert quantized.matrix.parts[0].format is format
    found = quantized.matrix.dense().numpy()
    np.testing.assert_array_equal(found, read(QUANTIZERS[format](rows), format))
    assert quantized.error / quantized.squares == pytest.approx(error(found, rows), rel=1e-5)


def test_a_matrix_of_several_parts_is_quantised_as_one() -> None:
    rows = gaussian(3)
    halves = Part.whole(Format.F16, rows[:8].astype(np.float16).reshape(-1).view(np.uint8), 1024)
    turned = Part.whole(Format.F32, rows[8:].reshape(-1).view(np.uint8), 1024).reordered(np.arange(7, -1, -1))
    matrix = StoredMatrix((halves, turned))
    found = quantize_matrix(matrix, Format.Q4_K).matrix
    np.testing.assert_array_equal(found.dense().numpy(), read(quantize_q4_k(matrix.dense().numpy()), Format.Q4_K))


def test_no_more_than_some_rows_are_float32_beside_a_matrix() -> None:
    matrix = stored(np.random.default_rng(4).normal(size=(8192, 1024)).astype(np.float32))
    quantize_matrix(matrix, Format.Q4_K)
    tracemalloc.start()
    try:
        blocks = quantize_matrix(matrix, Format.Q4_K).matrix.nbytes
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak - blocks < matrix.nbytes / 2


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_a_weight_that_is_not_finite_is_refused_by_its_place(value: float) -> None:
    rows = gaussian()
    rows[5, 7] = value
    with pytest.raises(ValueError, match=r"weight \[5, 7\] is not finite"):
        quantize_matrix(stored(rows), Format.Q4_K)


def test_a_weight_above_what_a_scale_holds_is_refused() -> None:
    rows = gaussian()
    rows[3, 0] = 3e8
    with pytest.raises(ValueError, match=r"weight \[3, 0\] is too large for the float16 scales of Q8_0"):
        quantize_matrix(stored(rows), Format.Q8_0)


def test_rows_that_are_not_made_of_whole_blocks_are_refused() -> None:
    with pytest.raises(ValueError, match="288 weights is not made of blocks of 256, as Q6_K is"):
        quantize_matrix(stored(gaussian()[:, :288].copy()), Format.Q6_K)
