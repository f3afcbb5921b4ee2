"""Products with activations in 8 bits are those of the rounded numbers, and their bits depend on nothing else."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from stored_weights import random_matrix, random_part
from test_products import guarded
from torch import Tensor

from patchclamp_server.cpu.integers.table import CODES
from patchclamp_server.cpu.linear import Linear
from patchclamp_server.cpu.products import StoredProduct
from patchclamp_server.cpu.stored import Format, Part, StoredMatrix

every_format = pytest.mark.parametrize("format", list(CODES), ids=lambda f: f.name)
# Beyond the rows that read blocks by themselves, beyond the largest tile and those that codes are kept for.
ROWS = (1, 2, 3, 4, 5, 13, 64, 261)


def random(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape)))


def width_of(format: Format) -> int:
    """Blocks of 32 that are no whole 256, and more inputs than are multiplied at once."""
    return 1056 if format.weights == 32 else 1280


def rounded(x: Tensor) -> Tensor:
    """s q by groups of 32, in float64: s = max|x| / 127 in float32, q = x / s to the nearest, ties to even."""
    groups = x.view(len(x), -1, 32)
    scale = groups.abs().amax(2, keepdim=True) / 127
    q = torch.where(scale > 0, groups / torch.where(scale > 0, scale, 1), 0).round()
    return (q.double() * scale.double()).view(x.shape)


def product_of(format: Format, out: int = 29) -> StoredProduct:
    return StoredProduct(random_matrix(format, out, width_of(format)), rounds=True)


@every_format
def test_a_product_of_any_number_of_rows_is_that_of_the_weights_and_the_rounded_row(format: Format) -> None:
    product = product_of(format)
    weight, x = product.matrix.dense().double(), random(ROWS[-1], width_of(format))
    own = rounded(x)
    exact, size = own @ weight.t(), own.abs() @ weight.abs().t()
    for n in ROWS:
        # Lows and codes may be large where weights are small: codes of Q6_K have 32 more.
        assert ((product.multiply(x[:n]) - exact[:n]).abs() <= 1e-6 * size[:n]).all(), n


@every_format
@pytest.mark.parametrize("threads", [1, 2])
def test_the_bits_of_a_row_depend_neither_on_the_others_nor_on_threads(format: Format, threads: int) -> None:
    product, x = product_of(format, 61), random(ROWS[-1], width_of(format))
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


@every_format
def test_nothing_is_read_behind_the_last_row(format: Format) -> None:
    matrix = random_matrix(format, 17, 256)
    (part,) = matrix.parts
    x = random(9, 256)
    expected = StoredProduct(matrix, rounds=True).multiply(x)
    with guarded(part.memory) as memory, guarded(x.numpy().view(np.uint8).reshape(-1)) as of_x:
        product = StoredProduct(StoredMatrix((Part(format, memory, part.starts, part.width),)), rounds=True)
        row = torch.from_numpy(of_x.view(np.float32)).view(9, 256)
        assert torch.equal(product.multiply(row), expected)
        assert torch.equal(product.multiply(row[8:]), expected[8:])


@every_format
def test_chosen_outputs_have_the_bits_of_all(format: Format) -> None:
    product, x = product_of(format), random(6, width_of(format))
    index = np.array([0, 3, 4, 15, 16, 28])
    for n in (1, 6):
        expected = product.multiply(x[:n])[:, index]
        assert torch.equal(torch.from_numpy(product.multiply_chosen(x[:n].numpy(), index)), expected)
        assert torch.equal(product.chosen(index).multiply(x[:n]), expected)


@every_format
def test_a_row_of_zeros_gives_zeros(format: Format) -> None:
    assert not product_of(format).multiply(torch.zeros(1, width_of(format))).any()


@every_format
def test_a_constant_row_is_not_rounded(format: Format) -> None:
    product, x = product_of(format), torch.full((1, width_of(format)), 1.27)
    weight = product.matrix.dense().double()
    assert ((product.multiply(x) - x.double() @ weight.t()).abs() <= 1e-6 * (weight.abs().sum(1) * 1.27)).all()


@pytest.mark.parametrize("wrong", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("format", [Format.Q4_1, Format.Q8_0, Format.Q6_K], ids=lambda f: f.name)
def test_a_row_that_is_not_finite_gives_nan_and_leaves_the_others(format: Format, wrong: float) -> None:
    product, x = product_of(format), random(9, width_of(format))
    expected = product.multiply(x)
    x[4, 77] = wrong
    for rows in (slice(3, 6), slice(9)):
        y = product.multiply(x[rows])
        is_wrong = torch.arange(9)[rows] == 4
        assert y[is_wrong].isnan().all()
        assert torch.equal(y[~is_wrong], expected[rows][~is_wrong])


@pytest.mark.parametrize("size", [1e-44, 1e-39, 1e-35, 1e-20, 1e20, 3e35])
def test_sizes_at_the_ends_of_float32_are_rounded_alike(size: float) -> None:
    product = StoredProduct(random_matrix(Format.Q8_0, 29, 64), rounds=True)
    x = random(1, 64).clamp(-1, 1) * size
    # Groups below 1.5e-36 are 0.
    expected = (rounded(x) if size > 1e-36 else torch.zeros(1, 64).double()) @ product.matrix.dense().double().t()
    np.testing.assert_allclose(product.multiply(x), expected, rtol=1e-4, atol=1e-6 * size)


def test_ties_go_to_the_even_neighbour() -> None:
    x = torch.zeros(1, 32)
    x[0, :6] = torch.tensor([127.0, 0.5, 1.5, 2.5, -0.5, -1.5])
    product = StoredProduct(random_matrix(Format.Q8_0, 16, 32), rounds=True)
    whole = torch.zeros(1, 32)
    whole[0, :6] = torch.tensor([127.0, 0.0, 2.0, 2.0, 0.0, -2.0])
    assert torch.equal(product.multiply(x), product.multiply(whole))


def test_weights_that_are_floats_take_activations_as_they_are() -> None:
    parts = [random_part(format, 24, 512) for format in (Format.Q4_K, Format.F16, Format.Q8_0, Format.F32)]
    product, x = StoredProduct(StoredMatrix(tuple(parts)), rounds=True), random(5, 512)
    alone = [StoredProduct(StoredMatrix((part,)), rounds=True) for part in parts]
    assert [own.rounds for own in alone] == [True, False, True, False]
    assert torch.equal(product.multiply(x), torch.cat([own.multiply(x) for own in alone], dim=1))
    floats = StoredProduct(StoredMatrix((parts[1],)))
    assert torch.equal(alone[1].multiply(x), floats.multiply(x))


def test_single_outputs_can_be_computed_of_what_a_projection_takes() -> None:
    x = random(3, 512)
    linear = Linear(random_matrix(Format.Q6_K, 29, 512), None)
    assert linear.taken(x) is x
    linear.round_inputs()
    assert torch.equal(linear.taken(x), rounded(x).float())
    torch.testing.assert_close(linear.taken(x) @ linear.dense().t(), linear(x), rtol=1e-4, atol=1e-4)


def test_columns_of_a_projection_stay_the_weights() -> None:
    linear = Linear(random_matrix(Format.Q5_K, 29, 512), None)
    assert linear.round_inputs()
    index = torch.tensor([0, 31, 32, 511])
    assert torch.equal(linear.columns(index), linear.dense()[:, index].t())


BITS = """
import hashlib, json, sys
import numpy as np
import torch
from stored_weights import random_part
from patchclamp_server.cpu.integers.products import functions_of, multiply_rounded, record_bytes, round_rows
from patchclamp_server.cpu.integers.table import CODES
from patchclamp_server.cpu.stored import Format
x = torch.randn(9, 512, generator=torch.Generator().manual_seed(0))
records = np.zeros((9, record_bytes(512)), dtype=np.uint8)
round_rows(x.data_ptr(), 512, records.ctypes.data, 0, 9)
digests = [hashlib.sha256(records.tobytes()).hexdigest()]
for format in (Format.Q4_1, Format.Q8_0):
    part, functions, y = random_part(format, 29, 512), functions_of(format), torch.empty(9, 29)
    fields = [f.address for f in functions] + [CODES[format].block_bytes, format.weights, format.size]
    for n in (1, 9):
        multiply_rounded(
            *fields, part.starts.ctypes.data, part.memory.ctypes.data, 512, records.ctypes.data, n, y.data_ptr(), 29,
            0, 29,
        )
        digests.append(hashlib.sha256(y[:n].numpy().tobytes()).hexdigest())
print(json.dumps(digests))
"""


def bits(**environment: str) -> list[str]:
    paths = [str(Path(__file__).parents[1]), *sys.path]
    given = {**os.environ, "PYTHONPATH": os.pathsep.join(paths), **environment}
    out = subprocess.run([sys.executable, "-c", BITS], env=given, check=True, capture_output=True, text=True).stdout
    found: list[str] = json.loads(out)
    return found


@pytest.mark.skipif(os.uname().machine != "x86_64", reason="the names of instructions are those of x86")
@pytest.mark.parametrize("instructions", ["+sse3,+ssse3,+sse4.1,+sse4.2,+avx,+avx2,+fma,+f16c", "+avx,+fma"])
def test_other_instructions_give_the_same_bits(instructions: str) -> None:
    # numba's cache knows for which processor it holds code.
    assert bits(NUMBA_CPU_NAME="x86-64", NUMBA_CPU_FEATURES=instructions) == bits()
