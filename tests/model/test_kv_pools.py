"""How the pools of keys and values store them, whatever the size of blocks and heads."""

import math

import pytest
import torch
from torch import Tensor

from patchclamp_server.model.attention.pools import TILED, KvPool, Pool, TiledPool, token_bytes
from patchclamp_server.model.attention.row_attention import write

# Block size, KV heads, head_dim.
SHAPES = [(1, 1, 1), (4, 2, 5), (16, 3, 64), (32, 1, 20), (48, 2, 16)]
N_BLOCKS = 5


def numbers(shape: tuple[int, int, int]) -> tuple[Tensor, Tensor, Tensor]:
    """Keys and values of half of the token addresses, and these in any order."""
    size, kv, dim = shape
    generator = torch.Generator().manual_seed(sum(shape))
    slots = torch.randperm(N_BLOCKS * size, generator=generator)[: (N_BLOCKS * size + 1) // 2]
    k, v = torch.randn(2, len(slots), kv, dim, generator=generator)
    return k, v, slots


def codes_of(x: Tensor) -> tuple[Tensor, Tensor]:
    scales = x.abs().amax(dim=-1, keepdim=True) / 127
    return (x / scales).round(), scales


@pytest.mark.parametrize("shape", SHAPES)
def test_float32_is_kept_as_it_is(shape: tuple[int, int, int]) -> None:
    k, v, slots = numbers(shape)
    pool = TiledPool(N_BLOCKS, *shape)
    write(k, v, slots, pool)
    assert torch.equal(pool.keys_at(slots), k)
    assert torch.equal(pool.values_at(slots), v)


@pytest.mark.parametrize("shape", SHAPES)
def test_bfloat16_is_the_nearest_with_ties_to_even(shape: tuple[int, int, int]) -> None:
    k, v, slots = numbers(shape)
    # Ties between two neighbours: an odd multiple of half of their distance.
    k[0] = 1 + torch.arange(k[0].numel()).view_as(k[0]) % 64 * 2.0**-8
    pool = TiledPool(N_BLOCKS, *shape, torch.bfloat16)
    write(k, v, slots, pool)
    assert torch.equal(pool.keys_at(slots), k.bfloat16().float())
    assert torch.equal(pool.values_at(slots), v.bfloat16().float())


@pytest.mark.parametrize("shape", SHAPES)
def test_codes_are_the_nearest_multiples_of_a_scale_for_each_token_and_head(shape: tuple[int, int, int]) -> None:
    k, v, slots = numbers(shape)
    pool = TiledPool(N_BLOCKS, *shape, torch.int8)
    write(k, v, slots, pool)
    for x, stored in ((k, pool.keys_at(slots)), (v, pool.values_at(slots))):
        codes, scales = codes_of(x)
        assert torch.equal(stored, codes * scales)
        assert ((stored - x).abs() <= scales * 0.5001).all()


def test_zeros_are_zeros_in_codes() -> None:
    pool = TiledPool(N_BLOCKS, 4, 2, 5, torch.int8)
    slots = torch.tensor([7])
    noise, zeros = torch.randn(1, 2, 5), torch.zeros(1, 2, 5)
    write(noise, noise, slots, pool)
    write(zeros, zeros, slots, pool)
    assert not pool.keys_at(slots).any()
    assert not pool.values_at(slots).any()


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("dtype", TILED)
def test_what_is_not_finite_stays_so(dtype: torch.dtype, value: float) -> None:
    k, v, slots = numbers((4, 2, 5))
    k[1, 0, 3] = v[2, 1, 0] = value
    pool = TiledPool(N_BLOCKS, 4, 2, 5, dtype)
    write(k, v, slots, pool)
    keys, values = pool.keys_at(slots), pool.values_at(slots)
    assert not keys[1, 0].isfinite().all()
    assert not values[2, 1].isfinite().all()
    assert keys[0].isfinite().all()
    assert values[1].isfinite().all()


def pools(shape: tuple[int, int, int]) -> list[Pool]:
    cpu = torch.device("cpu")
    return [KvPool(N_BLOCKS, *shape, torch.float32, cpu), *(TiledPool(N_BLOCKS, *shape, dtype) for dtype in TILED)]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("which", range(4))
def test_what_was_kept_is_restored_bit_by_bit(which: int, shape: tuple[int, int, int]) -> None:
    pool = pools(shape)[which]
    k, v, slots = numbers(shape)
    fill(pool, k, v, slots)
    before = [rows.clone() for rows in pool.rows()]
    some = slots[::2]
    kept = pool.kept(some)
    fill(pool, v[::2], k[::2], some)
    pool.restore(some, kept)
    assert all(torch.equal(a, b) for a, b in zip(pool.rows(), before, strict=True))


def fill(pool: Pool, k: Tensor, v: Tensor, slots: Tensor) -> None:
    if isinstance(pool, TiledPool):
        write(k, v, slots, pool)
    else:
        pool.restore(slots, [k, v])


@pytest.mark.parametrize("which", range(4))
def test_cleared_blocks_are_zero_and_the_others_stay(which: int) -> None:
    pool = pools((4, 2, 5))[which]
    every = torch.arange(N_BLOCKS * 4)
    unknown = torch.full((len(every), 2, 5), math.nan)
    fill(pool, unknown, unknown, every)
    pool.clear([1, 3])
    cleared = torch.tensor([4, 5, 6, 7, 12, 13, 14, 15])
    for rows in pool.rows():
        assert not rows[cleared].any()
        assert not rows[[0, 8, 16]].isfinite().any()


@pytest.mark.parametrize(("dtype", "expected"), [(torch.float32, 46080), (torch.bfloat16, 23040), (torch.int8, 12240)])
def test_the_bytes_of_a_token_are_those_of_the_arrays(dtype: torch.dtype, expected: int) -> None:
    assert token_bytes(30, 3, 64, dtype, tiled=True) == expected
    pool = TiledPool(N_BLOCKS, 16, 3, 64, dtype)
    assert 30 * sum(array.nbytes for array in pool.arrays) == expected * 16 * N_BLOCKS
