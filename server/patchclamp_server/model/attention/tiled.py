"""Compiled code that writes keys and values to a tiled pool (pools.py), finds its tiles, and makes float32 of them.

numba compiles this and caches it on disk by this file alone: a change here needs one in row_attention.py and stages.py.
"""

# What numba compiles has no types for mypy, and an intrinsic's first argument is not its caller's to give.
# mypy: disable-error-code="call-arg, no-untyped-call, no-untyped-def"

import numba
import numpy as np

from patchclamp_server.cpu.vector import LINE, prefetch
from patchclamp_server.model.attention.pools import LANES

compiled = numba.njit(nogil=True, cache=True, error_model="numpy")

_BFLOAT16_NAN = np.uint16(0x7FC0)


@compiled
def write_rows(k, v, slots, keys, values, key_scales, value_scales, size):
    """Writes k and v [n, n_kv_heads, dim], float32, at token addresses `slots` [n]."""
    for i in range(k.shape[0]):
        write_row(k[i], v[i], slots[i], keys, values, key_scales, value_scales, size)


@compiled
def write_row(k, v, slot, keys, values, key_scales, value_scales, size):
    """Writes k and v [n_kv_heads, dim] at a token address."""
    n_kv, dim = k.shape
    width = (dim + LANES - 1) // LANES * LANES
    lanes = LANES if size % LANES == 0 else size
    block, offset = slot // size, slot % size
    for h in range(n_kv):
        own = (block * n_kv + h) * size
        key = (own + offset // lanes * lanes) * dim + offset % lanes
        value = (own + offset) * width
        if keys.itemsize == 4:
            for d in range(dim):
                keys[key + d * lanes] = k[h, d]
                values[value + d] = v[h, d]
        elif keys.itemsize == 2:
            _write_bfloat16(k[h], keys, key, lanes)
            _write_bfloat16(v[h], values, value, 1)
        else:
            key_scales[own + offset] = _write_codes(k[h], keys, key, lanes)
            value_scales[own + offset] = _write_codes(v[h], values, value, 1)


@compiled
def _write_bfloat16(x, out, at, step):
    for d in range(x.shape[0]):
        bits = x[d : d + 1].view(np.uint32)[0]
        nearest = np.uint16((bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))) >> np.uint32(16))
        out[at + d * step] = _BFLOAT16_NAN if np.isnan(x[d]) else nearest


@compiled
def _write_codes(x, out, at, step):
    """Returns the scale: NaN or infinite where a number is, with codes of 0."""
    most = np.float32(0)
    finite = True
    for d in range(x.shape[0]):
        most = max(most, abs(x[d]))
        finite = finite and np.isfinite(x[d])
    scale = most / np.float32(127) if finite else np.float32(np.nan)
    for d in range(x.shape[0]):
        out[at + d * step] = np.int8(np.rint(x[d] / scale)) if finite and scale > 0 else np.int8(0)
    return scale


@compiled
def find_tiles(table, size, n_kv, kv, dim, width, first_key, tiles, key_at, value_at):
    """Sets key_at and value_at [tiles] to where tiles of 16 keys and values from `first_key` on begin in a pool whose
    size is a multiple of 16."""
    block, offset = first_key // size, first_key % size
    for t in range(tiles):
        token = (table[block] * n_kv + kv) * size + offset
        key_at[t] = token * dim
        value_at[t] = token * width
        offset += LANES
        if offset == size:
            block, offset = block + 1, 0


@compiled
def find_scales(table, size, n_kv, kv, first_key, end_key, key_scales, value_scales, own):
    """Sets own[j] and own[256 + j] to the scales of the keys and values from `first_key` on."""
    step, half = LANES if size % LANES == 0 else 1, own.shape[0] // 2
    block, offset = first_key // size, first_key % size
    for j in range(0, end_key - first_key, step):
        token = (table[block] * n_kv + kv) * size + offset
        keys, values = key_scales[token : token + step], value_scales[token : token + step]
        to_keys, to_values = own[j : j + step], own[half + j : half + j + step]
        for i in range(step):
            to_keys[i], to_values[i] = keys[i], values[i]
        offset += step
        if offset == size:
            block, offset = block + 1, 0


@compiled
def ask_for_scales(table, size, n_kv, kv, first_key, end_key, key_scales, value_scales):
    """Prefetches the scales of the keys and values from `first_key` on."""
    for block in range(first_key // size, (end_key + size - 1) // size):
        token = (table[block] * n_kv + kv) * size
        lines = (size * 4 + LINE - 1) // LINE
        prefetch(key_scales, token, lines)
        prefetch(value_scales, token, lines)


@compiled
def copy_tiles(table, size, n_kv, kv, dim, width, first_key, end_key, keys, values, out_keys, out_values):
    """Copies the keys from `first_key` on to out_keys [tiles, dim, 16] and values to out_values [keys, width], float32;
    what follows the last one means nothing."""
    lanes = LANES if size % LANES == 0 else size
    block, offset = first_key // size, first_key % size
    for j in range(0, end_key - first_key, LANES if lanes == LANES else 1):
        own = (table[block] * n_kv + kv) * size
        if lanes == LANES:
            _floats(keys, (own + offset) * dim, out_keys, j * dim, LANES * dim)
            _floats(values, (own + offset) * width, out_values, j * width, LANES * width)
        else:
            key, to = own * dim + offset, j // LANES * LANES * dim + j % LANES
            for d in range(dim):
                out_keys[to + d * LANES] = _float(keys, key + d * lanes)
            _floats(values, (own + offset) * width, out_values, j * width, width)
        offset += LANES if lanes == LANES else 1
        if offset == size:
            block, offset = block + 1, 0


@compiled
def _floats(x, at, out, out_at, n):
    source, target = x[at : at + n], out[out_at : out_at + n]
    if x.itemsize == 2:
        bits = target.view(np.uint32)
        for k in range(n):
            bits[k] = np.uint32(source[k]) << np.uint32(16)
    else:
        for k in range(n):
            target[k] = np.float32(source[k])


@compiled
def _float(x, at):
    if x.itemsize == 2:
        return (x[at : at + 1].astype(np.uint32) << np.uint32(16)).view(np.float32)[0]
    return np.float32(x[at])
