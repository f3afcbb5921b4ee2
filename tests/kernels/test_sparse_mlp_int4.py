"""sparse_mlp: weights of four bits, as a format and in every kernel that reads them."""

import pytest
import torch
from guards import guard
from scratch import guarded_scratch
from torch import Tensor

from patchclamp_kernels.configs import Config
from patchclamp_kernels.sparse_mlp import (
    Int4Weight,
    NeuronSets,
    pack,
    quantise,
    sparse_down,
    sparse_linear,
    sparse_up,
    unpack,
)

TOLERANCE = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1.6e-2}
GROUPS = [32, 64, 128]
SMALL_UP = {True: Config({"BLOCK_J": 4, "BLOCK_D": 128, "STAGES": 1}), False: Config({"BLOCK_J": 16, "BLOCK_D": 128})}
SMALL_DOWN = {
    True: Config({"BLOCK_J": 8, "BLOCK_C": 128, "PROGRAMS": 6, "STAGES": 1}),
    False: Config({"BLOCK_J": 16, "BLOCK_C": 128, "PROGRAMS": 6}),
}


def levels(rows: int, columns: int) -> Tensor:
    return torch.randint(0, 16, (rows, columns), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


def weight(
    rows: int, columns: int, group: int, scales: torch.dtype = torch.float32, *, symmetric: bool = False
) -> Int4Weight:
    g = torch.Generator().manual_seed(rows)
    return quantise(torch.randn(rows, columns, generator=g).to(scales), group, symmetric=symmetric)


def guarded(w: Int4Weight) -> Int4Weight:
    zeros = None if w.zeros is None else guard(w.zeros).tensor
    return Int4Weight(guard(w.packed).tensor, guard(w.scales).tensor, zeros, w.group_size)


@pytest.mark.parametrize("group", GROUPS)
def test_unpack_is_the_inverse_of_pack(group: int) -> None:
    q = levels(5, 384)
    packed = pack(q, group)
    assert packed.shape == (5, 192)
    assert torch.equal(unpack(packed, group), q)


@pytest.mark.parametrize("group", GROUPS)
def test_column_c_of_a_group_is_a_nibble_of_a_little_endian_word(group: int) -> None:
    q = levels(3, 2 * group)
    words = pack(q, group).to(torch.int64).view(3, -1, 4)
    words = (words << torch.tensor([0, 8, 16, 24])).sum(2).view(3, 2, group // 8)
    for c in range(group):
        nibble = words[:, :, c % (group // 8)] >> 4 * (c // (group // 8)) & 15
        assert torch.equal(nibble, q.view(3, 2, group)[:, :, c].to(torch.int64))


@pytest.mark.parametrize("group", GROUPS)
def test_every_level_of_a_weight_comes_back(group: int) -> None:
    q = levels(4, 256)
    scales, zeros = torch.rand(4, 256 // group) + 0.1, torch.full((4, 256 // group), 3.0)
    w = Int4Weight(pack(q, group), scales, zeros, group)
    want = scales.repeat_interleave(group, 1) * (q - zeros.repeat_interleave(group, 1))
    assert torch.equal(w.dequantise(torch.float32), want)
    symmetric = Int4Weight(w.packed, scales, None, group)
    assert torch.equal(symmetric.dequantise(torch.float32), scales.repeat_interleave(group, 1) * (q.float() - 8))


@pytest.mark.parametrize("symmetric", [False, True])
def test_quantisation_rounds_to_the_nearest_level(symmetric: bool) -> None:
    plain = torch.randn(6, 256, generator=torch.Generator().manual_seed(1))
    w = quantise(plain, 64, symmetric=symmetric)
    error = (w.dequantise(torch.float32) - plain).view(6, 4, 64).abs().amax(2)
    # A zero is a level, which can shift the ends of the range by half a step; symmetric, one end has no level 16.
    assert (error <= w.scales.abs() * (1.0 if symmetric else 0.75)).all()
    assert (w.zeros is None) == symmetric


@pytest.mark.parametrize("symmetric", [False, True])
def test_zero_is_a_level(symmetric: bool) -> None:
    plain = torch.randn(4, 128, generator=torch.Generator().manual_seed(2)) + 0.7
    plain[0], plain[1, 5], plain[2, :64] = 0.0, 0.0, 0.0
    dense = quantise(plain, 64, symmetric=symmetric).dequantise(torch.float32)
    assert torch.equal(dense[plain == 0], torch.zeros(int((plain == 0).sum())))


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("group", GROUPS)
@pytest.mark.parametrize("rows", [1, 3, 18])
def test_sets_of_neurons_agree_with_the_dequantised_weights(rows: int, group: int, symmetric: bool) -> None:
    d, d_ff = 384, 40
    x = torch.randn(rows, d, generator=torch.Generator().manual_seed(3)) / d**0.5
    up, down = weight(2 * d_ff, d, group, symmetric=symmetric), weight(d_ff, d, group, symmetric=symmetric)
    index = torch.randperm(d_ff, generator=torch.Generator().manual_seed(4))[:25].int()[None]
    index[0, 6] = -1
    sets = NeuronSets(index, torch.zeros(rows, dtype=torch.int32))
    one = rows == 1
    with guarded_scratch():
        h = sparse_up(x, guarded(up), sets, config=SMALL_UP[one])
        y = sparse_down(h, guarded(down), sets, config=SMALL_DOWN[one])
    dense = [w.dequantise(torch.float64) for w in (up, down)]
    gate, value = (x.double() @ dense[0].T).chunk(2, dim=1)
    neurons = torch.where(index[0] >= 0, (torch.nn.functional.silu(gate) * value)[:, index[0].long()], 0)
    kept = dense[1][index[0].long()]
    torch.testing.assert_close(h.double(), neurons, rtol=0, atol=1e-5 * neurons.abs().max().item())
    want = neurons @ kept
    torch.testing.assert_close(y.double(), want, rtol=0, atol=1e-5 * max(1, want.abs().max().item()))


@pytest.mark.parametrize("dtype", list(TOLERANCE))
@pytest.mark.parametrize("scales", list(TOLERANCE))
@pytest.mark.parametrize("rows", [1, 3])
def test_a_threshold_works_with_any_dtype_of_inputs_and_of_scales(
    rows: int, scales: torch.dtype, dtype: torch.dtype
) -> None:
    w = weight(70, 192, 64, scales)
    x = (torch.randn(rows, 70, generator=torch.Generator().manual_seed(5)) / 8).to(dtype)
    with guarded_scratch():
        y = sparse_linear(x, guarded(w), threshold=0.05, config=SMALL_DOWN[rows == 1])
        default = sparse_linear(x, guarded(w), threshold=0.05)
    want = torch.where(x.float().abs() < 0.05, 0, x.double()) @ w.dequantise(torch.float64)
    limit = TOLERANCE[dtype] * max(1, want.abs().max().item())
    torch.testing.assert_close(y.double(), want, rtol=0, atol=limit)
    torch.testing.assert_close(default.double(), want, rtol=0, atol=limit)


@pytest.mark.parametrize("rows", [1, 4])
def test_inactive_neurons_are_not_read(rows: int) -> None:
    down = weight(40, 128, 32)
    sets = NeuronSets(torch.arange(0, 40, 2).int()[None], torch.zeros(rows, dtype=torch.int32))
    h = torch.randn(rows, 20)
    want = sparse_down(h, down, sets)
    down.scales[1::2] = float("nan")
    assert torch.equal(sparse_down(h, down, sets), want)


@pytest.mark.parametrize("rows", [1, 4])
def test_the_same_batch_twice_has_the_same_bits(rows: int) -> None:
    w, x = weight(70, 192, 64), torch.randn(rows, 70)
    assert torch.equal(sparse_linear(x, w, threshold=0.5), sparse_linear(x, w, threshold=0.5))


def test_parts_that_do_not_fit_are_refused_by_name() -> None:
    packed, scales = torch.zeros(4, 64, dtype=torch.uint8), torch.ones(4, 4)
    with pytest.raises(ValueError, match="packed"):
        Int4Weight(packed.int(), scales, None, 32)
    with pytest.raises(ValueError, match="packed"):
        Int4Weight(packed[:, :40].contiguous(), scales, None, 32)
    with pytest.raises(ValueError, match="scales"):
        Int4Weight(packed, scales[:, :3].contiguous(), None, 32)
    with pytest.raises(ValueError, match="zeros"):
        Int4Weight(packed, scales, scales.half(), 32)
    with pytest.raises(ValueError, match="group_size"):
        Int4Weight(packed, scales, None, 48)
    with pytest.raises(ValueError, match="weight"):
        quantise(torch.zeros(4, 100), 64)
    with pytest.raises(ValueError, match="q is"):
        pack(torch.zeros(4, 128), 64)
    with pytest.raises(ValueError, match="weight_in_major"):
        sparse_linear(torch.zeros(1, 5), Int4Weight(packed, scales, None, 32), threshold=0.0)
