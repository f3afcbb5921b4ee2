"""In decode a sequence has one row. Its keys are distributed over splits, and the splits are combined in order.

A program computes the query heads of one KV head over one split, so that every key is read once. Heads are padded to
16 rows for the tensor cores, which idle in this kernel anyway. Besides its loads a tile costs one maximum across the
warps: the sum of the softmax, the read-out and the marked mass are kept for each lane of the tile, and are reduced once
after the loop.
"""

import triton
import triton.language as tl

from patchclamp_kernels.dot import product
from patchclamp_kernels.paged_attention.scores import exponents
from patchclamp_kernels.paged_attention.visibility import key_tiles

# More splits than a combine can load at once are not made.
MAX_SPLITS = 128
_MAX_SPLITS = tl.constexpr(MAX_SPLITS)
_NO_KEY = tl.constexpr(2147483647)


@triton.jit(do_not_specialize=["table_width", "n_splits", "window", "sink", "recent"])
def decode_kernel(
    q,
    key_cache,
    value_cache,
    block_tables,
    context_lengths,
    head_scale,
    streaming_heads,
    marked,
    z,
    argmax,
    probability,
    marked_mass,
    off_sink,
    partials,
    table_width,
    n_splits,
    scale,
    ceiling,
    window,
    sink,
    recent,
    N_HEADS: tl.constexpr,
    N_KV: tl.constexpr,
    DIM: tl.constexpr,
    DIM_PAD: tl.constexpr,
    GROUP_PAD: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    HAS_CAP: tl.constexpr,
    HAS_WINDOW: tl.constexpr,
    DIRECT: tl.constexpr,
    TILE: tl.constexpr,
    SPLIT: tl.constexpr,
):
    """Runs on the grid (S · KV, splits): the KV heads of a token, neighbours in memory, are read at one time."""
    GROUP: tl.constexpr = N_HEADS // N_KV
    HAS_STREAMING: tl.constexpr = streaming_heads is not None
    row = (tl.program_id(0) // N_KV).to(tl.int64)
    kv_head = tl.program_id(0) % N_KV
    split = tl.program_id(1)
    members = tl.arange(0, GROUP_PAD)
    in_group = members < GROUP
    heads = kv_head * GROUP + members
    columns = tl.arange(0, DIM_PAD)
    used = columns < DIM
    lanes = tl.arange(0, TILE)
    outputs = row * N_HEADS + heads

    position = tl.load(context_lengths + row) - 1
    streams = in_group
    all_streaming = False
    if HAS_STREAMING:
        streams = tl.load(streaming_heads + heads, mask=in_group, other=1) != 0
        all_streaming = tl.min(streams.to(tl.int32), axis=0) != 0
    sink_tiles, first_tile, end_tile = key_tiles(
        position, position, all_streaming, window, sink, recent, TILE, HAS_WINDOW, HAS_STREAMING
    )
    n_tiles = sink_tiles + end_tile - first_tile
    # A split is SPLIT keys long, and longer where the context has more than n_splits of them.
    share = tl.maximum(tl.cdiv(n_tiles, n_splits), SPLIT // TILE)
    begin = split * share
    if not DIRECT:
        stats = partials + tl.num_programs(0).to(tl.int64) * GROUP * n_splits * DIM + outputs * n_splits + split
        plane = tl.num_programs(0).to(tl.int64) * GROUP * n_splits
        if begin >= n_tiles:
            tl.store(stats, tl.full((GROUP_PAD,), float("-inf"), tl.float32), mask=in_group)
            return

    # Heads beside the group are zeros: their scores are finite and are never stored.
    query = tl.load(q + outputs[:, None] * DIM + columns[None, :], mask=in_group[:, None] & used[None, :], other=0.0)
    if marked is not None:
        marked_low = tl.load(marked + row * 2)
        marked_high = tl.load(marked + row * 2 + 1)
    top = tl.full((GROUP_PAD,), float("-inf"), tl.float32)
    weight_sum = tl.zeros((GROUP_PAD, TILE), tl.float32)
    mass_sum = tl.zeros((GROUP_PAD, TILE), tl.float32)
    best = tl.full((GROUP_PAD, TILE), float("-inf"), tl.float32)
    best_start = tl.zeros((GROUP_PAD, TILE), tl.int32)
    off = tl.full((GROUP_PAD, TILE), float("-inf"), tl.float32)
    acc = tl.zeros((GROUP_PAD, DIM_PAD), tl.float32)
    for tile in range(begin, tl.minimum(begin + share, n_tiles)):
        start = tl.where(tile < sink_tiles, tile, tile - sink_tiles + first_tile) * TILE
        tokens = start + lanes
        seen = tokens <= position
        if HAS_WINDOW:
            seen &= position - tokens < window
        if HAS_STREAMING:
            near = (tokens < sink) | (position - tokens < recent)
            visible = seen[None, :] & (near[None, :] | (streams == 0)[:, None])
            seen &= near | (all_streaming == 0)
        else:
            visible = seen[None, :]
        # What nobody may see is not loaded: a block may hold anything where no token stands, NaN included.
        block = tl.load(block_tables + row * table_width + tokens // BLOCK_SIZE, mask=seen, other=0)
        slots = block.to(tl.int64) * BLOCK_SIZE + tokens % BLOCK_SIZE
        offsets = (slots * N_KV + kv_head)[:, None] * DIM + columns[None, :]
        loaded = seen[:, None] & used[None, :]
        k = tl.load(key_cache + offsets, mask=loaded, other=0.0)
        scores = product(query, tl.trans(k), tl.zeros((GROUP_PAD, TILE), tl.float32))
        scores = exponents(scores, scale, ceiling, HAS_CAP)
        scores = tl.where(visible, scores, float("-inf"))
        if argmax is not None:
            best_start = tl.where(scores > best, start, best_start)
            best = tl.maximum(best, scores)
        if off_sink is not None:
            off = tl.maximum(off, tl.where(tokens[None, :] > 0, scores, float("-inf")))
        new_top = tl.maximum(top, tl.max(scores, axis=1))
        finite = tl.where(new_top > float("-inf"), new_top, 0.0)
        decay = tl.exp2(top - finite)
        weights = tl.exp2(scores - finite[:, None])
        weight_sum = weight_sum * decay[:, None] + weights
        if marked is not None:
            in_span = (tokens >= marked_low) & (tokens < marked_high)
            mass_sum = mass_sum * decay[:, None] + tl.where(in_span[None, :], weights, 0.0)
        v = tl.load(value_cache + offsets, mask=loaded, other=0.0)
        acc = product(weights.to(v.dtype), v, acc * decay[:, None])
        top = new_top

    total = tl.sum(weight_sum, axis=1)
    mass = tl.sum(mass_sum, axis=1)
    off_top = tl.max(off, axis=1)
    key = tl.min(tl.where(best == top[:, None], best_start + lanes[None, :], _NO_KEY), axis=1)
    stored = in_group[:, None] & used[None, :]
    if DIRECT:
        divisor = tl.where(total > 0, total, 1.0)
        attended = acc / divisor[:, None]
        if head_scale is not None:
            attended *= tl.load(head_scale + outputs, mask=in_group, other=0.0)[:, None]
        tl.store(z + outputs[:, None] * DIM + columns[None, :], attended.to(z.dtype.element_ty), mask=stored)
        if argmax is not None:
            tl.store(argmax + outputs, tl.where(total > 0, key, -1), mask=in_group)
            tl.store(probability + outputs, tl.where(total > 0, 1.0 / divisor, 0.0), mask=in_group)
        if marked is not None:
            tl.store(marked_mass + outputs, mass / divisor, mask=in_group)
        if off_sink is not None:
            tl.store(off_sink + outputs, tl.where(total > 0, tl.exp2(off_top - top) / divisor, 0.0), mask=in_group)
    else:
        part = (outputs * n_splits + split)[:, None] * DIM + columns[None, :]
        tl.store(partials + part, acc, mask=stored)
        tl.store(stats, top, mask=in_group)
        tl.store(stats + plane, total, mask=in_group)
        if argmax is not None:
            tl.store(stats + 2 * plane, key.to(tl.float32, bitcast=True), mask=in_group)
        if marked is not None:
            tl.store(stats + 3 * plane, mass, mask=in_group)
        if off_sink is not None:
            tl.store(stats + 4 * plane, off_top, mask=in_group)


@triton.jit(do_not_specialize=["n_splits"])
def combine_kernel(
    partials,
    head_scale,
    z,
    argmax,
    probability,
    marked_mass,
    off_sink,
    n_splits,
    N_HEADS: tl.constexpr,
    DIM: tl.constexpr,
    DIM_PAD: tl.constexpr,
    CHUNK: tl.constexpr,
):
    """Runs on the grid (S, H). A split that saw no key has a maximum of -inf, and nothing else of it was written."""
    output = tl.program_id(0).to(tl.int64) * N_HEADS + tl.program_id(1)
    plane = tl.num_programs(0).to(tl.int64) * N_HEADS * n_splits
    stats = partials + plane * DIM + output * n_splits
    splits = tl.arange(0, _MAX_SPLITS)
    maxima = tl.load(stats + splits, mask=splits < n_splits, other=float("-inf"))
    present = maxima > float("-inf")
    top = tl.max(maxima, axis=0)
    top = tl.where(top > float("-inf"), top, 0.0)
    share = tl.exp2(maxima - top)
    total = tl.sum(share * tl.load(stats + plane + splits, mask=present, other=0.0), axis=0)
    divisor = tl.where(total > 0, total, 1.0)

    columns = tl.arange(0, DIM_PAD)
    chunk = tl.arange(0, CHUNK)
    acc = tl.zeros((CHUNK, DIM_PAD), tl.float32)
    for first in range(0, n_splits, CHUNK):
        mine = first + chunk
        maximum = tl.load(stats + mine, mask=mine < n_splits, other=float("-inf"))
        there = maximum > float("-inf")
        part = tl.load(
            partials + (output * n_splits + mine)[:, None] * DIM + columns[None, :],
            mask=there[:, None] & (columns < DIM)[None, :],
            other=0.0,
        )
        acc += part * tl.exp2(maximum - top)[:, None]
    attended = tl.sum(acc, axis=0) / divisor
    if head_scale is not None:
        attended *= tl.load(head_scale + output)
    tl.store(z + output * DIM + columns, attended.to(z.dtype.element_ty), mask=columns < DIM)
    if argmax is not None:
        winners = present & (maxima == top)
        keys = tl.load(stats + 2 * plane + splits, mask=winners, other=0.0).to(tl.int32, bitcast=True)
        key = tl.min(tl.where(winners, keys, _NO_KEY), axis=0)
        tl.store(argmax + output, tl.where(total > 0, key, -1))
        tl.store(probability + output, tl.where(total > 0, 1.0 / divisor, 0.0))
    if marked_mass is not None:
        masses = tl.load(stats + 3 * plane + splits, mask=present, other=0.0)
        tl.store(marked_mass + output, tl.sum(share * masses, axis=0) / divisor)
    if off_sink is not None:
        tops = tl.load(stats + 4 * plane + splits, mask=present, other=float("-inf"))
        tl.store(off_sink + output, tl.exp2(tl.max(tops, axis=0) - top) / divisor)
