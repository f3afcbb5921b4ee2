"""Sums over chosen inputs of stored weights are those of the weights that gguf.dequantize gives."""

import numpy as np
import pytest
import torch
from stored_weights import random_matrix, random_part

from patchclamp_server.cpu.linear import Linear
from patchclamp_server.cpu.sparse.codes import codes_of
from patchclamp_server.cpu.sparse.input_rows import CodeInputRows, input_rows
from patchclamp_server.cpu.stored import Format, StoredMatrix

WITH_CODES = [
    Format.Q4_0, Format.Q4_1, Format.Q5_0, Format.Q8_0, Format.Q2_K, Format.Q3_K, Format.Q4_K, Format.Q6_K,
]  # fmt: skip


@pytest.mark.parametrize("format", WITH_CODES, ids=lambda f: f.name)
def test_codes_and_scales_make_the_weights_of_gguf(format: Format) -> None:
    part = random_part(format, 7, 512)
    codes = codes_of(part)
    assert codes is not None
    groups = codes.codes.reshape(7, -1, codes.group).astype(np.float32)
    weights = groups * codes.scales[:, :, None] + (0 if codes.lows is None else codes.lows[:, :, None])
    assert np.array_equal(weights.reshape(7, 512), part.dense())


@pytest.mark.parametrize("format", list(Format), ids=lambda f: f.name)
def test_a_sum_over_chosen_inputs_is_that_of_the_weights(format: Format) -> None:
    matrix = random_matrix(format, 45, 512)
    rows = input_rows(Linear(matrix, None))
    assert isinstance(rows, CodeInputRows) == (format in WITH_CODES)
    generator = np.random.default_rng(2)
    index = np.sort(generator.permutation(512)[:200])
    factors = generator.standard_normal((2, 200)).astype(np.float32)
    weights = matrix.dense().double().numpy()[:, index]
    exact, size = factors @ weights.T, np.abs(factors) @ np.abs(weights).T
    for found in (rows.sum(factors, index), rows.take(index)(factors)):
        assert (np.abs(found - exact) <= 2e-6 * size).all()


def test_parts_of_several_formats_are_summed_as_floats() -> None:
    parts = random_part(Format.Q4_K, 20, 256), random_part(Format.Q6_K, 12, 256)
    matrix = StoredMatrix(parts)
    index = np.array([0, 5, 255])
    found = input_rows(Linear(matrix, None)).sum(np.ones((1, 3), dtype=np.float32), index)
    torch.testing.assert_close(torch.from_numpy(found[0]), matrix.dense()[:, index].sum(1))
