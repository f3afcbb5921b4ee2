"""Products with stored rows are those of what gguf.dequantize gives, and their bits depend on no other row."""

import ctypes
import mmap
import os
import subprocess
import sys

import numpy as np
import pytest
import torch
from stored_weights import random_matrix, random_part
from torch import Tensor

from patchclamp_server.cpu.linear import Linear
from patchclamp_server.cpu.products import StoredProduct
from patchclamp_server.cpu.stored import Format, Part, StoredMatrix

every_format = pytest.mark.parametrize("format", list(Format), ids=lambda f: f.name)
# Beyond the largest tile, beyond the rows that panels are kept for, and none of them a whole number of tiles.
ROWS = (1, 2, 5, 13, 64, 70)


def random(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape)))


def width_of(format: Format, blocks: int) -> int:
    """Blocks of codes, or numbers that are no whole unit of 32."""
    return blocks * 256 if format.weights > 1 else blocks * 256 + 24


@every_format
def test_weights_are_those_of_gguf_to_the_bit(format: Format) -> None:
    matrix = random_matrix(format, 37, width_of(format, 2))
    found = StoredProduct(matrix).rows(torch.arange(37))
    assert torch.equal(found.view(torch.int32), matrix.dense().view(torch.int32))


@every_format
def test_a_product_of_any_number_of_rows_is_that_of_the_weights(format: Format) -> None:
    # 5 blocks of inputs are more than are multiplied at once; 29 outputs are no whole number of tiles.
    matrix = random_matrix(format, 29, width_of(format, 5))
    product, weight = StoredProduct(matrix), matrix.dense().double()
    x = random(ROWS[-1], matrix.shape[1])
    exact, size = x.double() @ weight.t(), x.double().abs() @ weight.abs().t()
    for n in ROWS:
        assert ((product.multiply(x[:n]) - exact[:n]).abs() <= 1e-6 * size[:n]).all(), n


@every_format
@pytest.mark.parametrize("threads", [1, 2])
def test_the_bits_of_a_row_depend_neither_on_the_others_nor_on_threads(format: Format, threads: int) -> None:
    matrix = random_matrix(format, 29, width_of(format, 5))
    product, x = StoredProduct(matrix), random(ROWS[-1], matrix.shape[1])
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        alone = torch.cat([product.multiply(row) for row in x.split(1)])
        torch.set_num_threads(threads)
        for n in ROWS:
            assert torch.equal(product.multiply(x[:n]), alone[:n]), n
            assert torch.equal(product.multiply(x[-n:]), alone[-n:]), n
    finally:
        torch.set_num_threads(before)


def test_the_outputs_of_a_large_matrix_are_the_same_bits_on_any_number_of_threads() -> None:
    product, x = StoredProduct(random_matrix(Format.Q8_0, 4096, 1280)), random(9, 1280)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        alone = [product.multiply(x[:n]) for n in (1, 9)]
        torch.set_num_threads(3)
        assert all(torch.equal(product.multiply(x[: len(y)]), y) for y in alone)
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("rows", [1, 20])
def test_rows_of_a_part_may_lie_in_any_order(rows: int) -> None:
    part, order = random_part(Format.Q4_K, 40, 512), np.random.default_rng(1).permutation(40)
    x = random(rows, 512)
    whole = StoredProduct(StoredMatrix((part,))).multiply(x)
    assert torch.equal(StoredProduct(StoredMatrix((part.reordered(order),))).multiply(x), whole[:, order])


@pytest.mark.parametrize("rows", [1, 20])
def test_parts_of_other_formats_are_one_matrix(rows: int) -> None:
    parts = [random_part(format, n, 512) for format, n in ((Format.Q4_K, 25), (Format.Q6_K, 7), (Format.F16, 30))]
    product, x = StoredProduct(StoredMatrix(tuple(parts))), random(rows, 512)
    alone = [StoredProduct(StoredMatrix((part,))).multiply(x) for part in parts]
    assert torch.equal(product.multiply(x), torch.cat(alone, dim=1))
    outputs = torch.tensor([61, 0, 24, 25, 31, 32, 25])
    assert torch.equal(product.rows(outputs), product.matrix.dense()[outputs])


@pytest.mark.parametrize("rows", [1, 20])
def test_chosen_outputs_have_the_bits_that_all_have(rows: int) -> None:
    parts = [random_part(format, n, 256) for format, n in ((Format.Q4_0, 25), (Format.Q5_1, 7), (Format.BF16, 30))]
    product, x = StoredProduct(StoredMatrix(tuple(parts))), random(rows, 256)
    for outputs in ([], [31], [0, 3, 24, 25, 40, 41, 61], list(range(62))):
        index = np.array(outputs, dtype=np.int64)
        expected = product.multiply(x)[:, index]
        assert torch.equal(torch.from_numpy(product.multiply_chosen(x.numpy(), index)), expected)
        assert torch.equal(StoredProduct(product.matrix.chosen(index)).multiply(x), expected)


@every_format
@pytest.mark.parametrize("rows", [1, 20])
def test_nothing_is_read_past_the_end_of_a_file(format: Format, rows: int) -> None:
    """The weights, and x as well, end where memory ends that may be read."""
    matrix = random_matrix(format, 6, width_of(format, 1))
    stored, x = matrix.parts[0].memory, random(rows, matrix.shape[1])
    with guarded(stored) as memory, guarded(x.numpy().view(np.uint8).reshape(-1)) as of_x:
        at_the_end = StoredMatrix((Part.whole(format, memory, matrix.shape[1]),))
        last = torch.from_numpy(of_x.view(np.float32)).view(rows, -1)
        product = StoredProduct(at_the_end)
        assert torch.equal(product.multiply(last), StoredProduct(matrix).multiply(x))
        assert torch.equal(product.rows(torch.arange(6)), matrix.dense())


@every_format
def test_a_scale_that_is_no_number_shows_in_its_row_alone(format: Format) -> None:
    part = random_part(format, 5, width_of(format, 1))
    size = format.row_bytes(part.width)
    nan = np.array([0xFF, 0x7F] * 2, dtype=np.uint8)
    row = part.memory[2 * size : 3 * size]
    at = {Format.Q2_K: 80, Format.Q3_K: 108, Format.Q6_K: 208, Format.F32: 0}.get(format, 0)
    row[at : at + 2] = nan[:2]
    if format is Format.F32:
        row[2:4] = nan[:2]
    for rows in (1, 20):
        y = StoredProduct(StoredMatrix((part,))).multiply(random(rows, part.width))
        assert y.isnan().any(0).tolist() == [False, False, True, False, False]


@pytest.mark.parametrize("rows", [1, 20])
def test_what_is_not_finite_in_x_shows_in_its_row_alone(rows: int) -> None:
    matrix, x = random_matrix(Format.F32, 30, 280), random(rows + 1, 280)
    x[0, 279] = torch.inf
    x[rows, 0] = torch.nan
    y = StoredProduct(matrix).multiply(x)
    assert y[0].isinf().all()
    assert y[rows].isnan().all()
    assert y[1:rows].isfinite().all()


def test_an_output_that_is_none_is_refused() -> None:
    product = StoredProduct(random_matrix(Format.Q8_0, 5, 64))
    for output in (-1, 5):
        with pytest.raises(IndexError, match="0 to 4"):
            product.rows(torch.tensor([output]))


@pytest.mark.parametrize("format", [Format.Q4_1, Format.Q6_K, Format.F32])
def test_a_projection_of_stored_weights_has_their_rows_and_columns(format: Format) -> None:
    matrix, bias = random_matrix(format, 20, 512), random(20)
    linear, x, dense = Linear(matrix, bias), random(9, 512), matrix.dense()
    assert linear.shape == (20, 512)
    torch.testing.assert_close(linear(x), x @ dense.t() + bias, rtol=1e-4, atol=1e-4)
    assert torch.equal(linear.rows(torch.tensor([19, 0, 7])), dense[[19, 0, 7]])
    assert torch.equal(linear.columns(torch.tensor([511, 0, 32])), dense.t()[[511, 0, 32]])
    assert torch.equal(linear.dense(), dense)


@pytest.mark.parametrize(
    ("processor", "features"), [("haswell", "+avx2,+avx,+fma,+f16c,+bmi,+bmi2"), ("sandybridge", "+avx")]
)
def test_bits_are_those_of_processors_with_other_vectors(processor: str, features: str) -> None:
    """Of one without AVX-512, and of one that has neither fused multiply-adds nor conversions of halves."""
    found = [
        subprocess.run(
            [sys.executable, "-c", OF_A_PROCESSOR], env={**os.environ, **names}, capture_output=True, check=True
        ).stdout
        for names in ({}, {"NUMBA_CPU_NAME": processor, "NUMBA_CPU_FEATURES": features})
    ]
    assert found[0] == found[1] != b""


# Its functions are compiled for the processor that the environment names, and cached for that one.
OF_A_PROCESSOR = """
import sys
import numpy as np
import torch
from patchclamp_server.cpu.products import StoredProduct
from patchclamp_server.cpu.stored import Format, Part, StoredMatrix

blocks = (np.arange(29 * 5 * 144) * 7 % 61).astype(np.uint8)
product = StoredProduct(StoredMatrix((Part.whole(Format.Q4_K, blocks, 1280),)))
x = torch.arange(13 * 1280).view(13, 1280).sin()
sys.stdout.buffer.write(product.multiply(x).numpy().tobytes() + product.multiply(x[:2]).numpy().tobytes())
"""


class guarded:
    """A copy of bytes that ends at the end of memory that may be read."""

    def __init__(self, values: np.ndarray) -> None:
        page = mmap.PAGESIZE
        size = -(-len(values) // page) * page
        self.memory = mmap.mmap(-1, size + page)
        self.array = np.frombuffer(self.memory, dtype=np.uint8)[size - len(values) : size]
        self.array[:] = values
        self.page = np.frombuffer(self.memory, dtype=np.uint8)[size:].ctypes.data

    def __enter__(self) -> np.ndarray:
        self._protect(0)
        return self.array

    def __exit__(self, *_: object) -> None:
        self._protect(mmap.PROT_READ | mmap.PROT_WRITE)

    def _protect(self, protection: int) -> None:
        libc = ctypes.CDLL(None, use_errno=True)
        assert libc.mprotect(ctypes.c_void_p(self.page), ctypes.c_size_t(mmap.PAGESIZE), protection) == 0
