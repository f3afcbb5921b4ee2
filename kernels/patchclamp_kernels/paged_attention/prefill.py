"""Prefill computes the rows of a prompt, or of a chunk of one behind a context that is in the cache already.

A program computes up to ROWS rows of one query head; the heads of a group run side by side and find their keys in the
L2. Each thread group of a row holds whole rows of a tile, so that the read-out may reduce every tile: there is no room
in registers for a running maximum of each lane, and no need for one.
"""

import triton
import triton.language as tl

from patchclamp_kernels.dot import product
from patchclamp_kernels.paged_attention.scores import exponents
from patchclamp_kernels.paged_attention.visibility import key_tiles

_NO_KEY = tl.constexpr(2147483647)


@triton.jit(do_not_specialize=["table_width", "tile_rows", "window", "sink", "recent"])
def prefill_kernel(
    q,
    key_cache,
    value_cache,
    block_tables,
    query_starts,
    context_lengths,
    tiles,
    head_scale,
    streaming_heads,
    marked,
    z,
    argmax,
    probability,
    marked_mass,
    off_sink,
    table_width,
    tile_rows,
    scale,
    ceiling,
    window,
    sink,
    recent,
    N_HEADS: tl.constexpr,
    N_KV: tl.constexpr,
    DIM: tl.constexpr,
    DIM_PAD: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    HAS_CAP: tl.constexpr,
    HAS_WINDOW: tl.constexpr,
    ROWS: tl.constexpr,
    TILE: tl.constexpr,
):
    """Runs on the grid (H, tiles · tile_rows / ROWS), the last rows of a prompt first: they are the most work."""
    HAS_STREAMING: tl.constexpr = streaming_heads is not None
    head = tl.program_id(0)
    place = tl.num_programs(1) - 1 - tl.program_id(1)
    parts = tile_rows // ROWS
    sequence = tl.load(tiles + place // parts * 2)
    first_row = tl.load(tiles + place // parts * 2 + 1) + place % parts * ROWS
    start_row = tl.load(query_starts + sequence)
    n_rows = tl.load(query_starts + sequence + 1) - start_row
    if first_row >= n_rows:
        return
    context = tl.load(context_lengths + sequence)
    rows = first_row + tl.arange(0, ROWS)
    is_row = rows < n_rows
    positions = context - n_rows + rows
    first_position = context - n_rows + first_row
    last_position = context - n_rows + tl.minimum(first_row + ROWS, n_rows) - 1
    columns = tl.arange(0, DIM_PAD)
    outputs = (start_row + rows).to(tl.int64) * N_HEADS + head
    stored = is_row[:, None] & (columns < DIM)[None, :]
    query = tl.load(q + outputs[:, None] * DIM + columns[None, :], mask=stored, other=0.0)

    streams = False
    if HAS_STREAMING:
        streams = tl.load(streaming_heads + head) != 0
    sink_tiles, first_tile, end_tile = key_tiles(
        first_position, last_position, streams, window, sink, recent, TILE, HAS_WINDOW, HAS_STREAMING
    )
    marked_low = tl.zeros((ROWS,), tl.int32)
    marked_high = tl.zeros((ROWS,), tl.int32)
    if marked is not None:
        spans = marked + (start_row + rows).to(tl.int64) * 2
        marked_low = tl.load(spans, mask=is_row, other=0)
        marked_high = tl.load(spans + 1, mask=is_row, other=0)
    top = tl.full((ROWS,), float("-inf"), tl.float32)
    total = tl.zeros((ROWS,), tl.float32)
    mass = tl.zeros((ROWS,), tl.float32)
    key = tl.full((ROWS,), -1, tl.int32)
    off = tl.full((ROWS,), float("-inf"), tl.float32)
    acc = tl.zeros((ROWS, DIM_PAD), tl.float32)
    table = block_tables + sequence.to(tl.int64) * table_width
    # Tiles of which every row sees every key need no masks: all but the last few, where no head has a window.
    n_tiles = sink_tiles + end_tile - first_tile
    plain = 0
    if not (HAS_WINDOW or HAS_STREAMING):
        plain = tl.minimum((first_position + 1) // TILE, n_tiles)
        top, total, mass, key, off, acc = _attend(
            query, key_cache, value_cache, table, head, positions, marked_low, marked_high, streams,
            top, total, mass, key, off, acc, 0, plain, sink_tiles, first_tile, first_position, last_position,
            scale, ceiling, window, sink, recent, N_HEADS, N_KV, DIM, DIM_PAD, BLOCK_SIZE,
            HAS_CAP, HAS_WINDOW, HAS_STREAMING, argmax is not None, off_sink is not None, marked is not None, False,
            TILE,
        )  # fmt: skip
    top, total, mass, key, off, acc = _attend(
        query, key_cache, value_cache, table, head, positions, marked_low, marked_high, streams,
        top, total, mass, key, off, acc, plain, n_tiles, sink_tiles, first_tile, first_position, last_position,
        scale, ceiling, window, sink, recent, N_HEADS, N_KV, DIM, DIM_PAD, BLOCK_SIZE,
        HAS_CAP, HAS_WINDOW, HAS_STREAMING, argmax is not None, off_sink is not None, marked is not None, True, TILE,
    )  # fmt: skip

    divisor = tl.where(total > 0, total, 1.0)
    attended = acc / divisor[:, None]
    if head_scale is not None:
        attended *= tl.load(head_scale + outputs, mask=is_row, other=0.0)[:, None]
    tl.store(z + outputs[:, None] * DIM + columns[None, :], attended.to(z.dtype.element_ty), mask=stored)
    if argmax is not None:
        tl.store(argmax + outputs, key, mask=is_row)
        tl.store(probability + outputs, tl.where(total > 0, 1.0 / divisor, 0.0), mask=is_row)
    if marked is not None:
        tl.store(marked_mass + outputs, mass / divisor, mask=is_row)
    if off_sink is not None:
        tl.store(off_sink + outputs, tl.where(total > 0, tl.exp2(off - top) / divisor, 0.0), mask=is_row)


@triton.jit
def _attend(
    query, key_cache, value_cache, table, head, positions, marked_low, marked_high, streams,
    top, total, mass, key, off, acc, begin, end, sink_tiles, first_tile, first_position, last_position,
    scale, ceiling, window, sink, recent,
    N_HEADS: tl.constexpr, N_KV: tl.constexpr, DIM: tl.constexpr, DIM_PAD: tl.constexpr, BLOCK_SIZE: tl.constexpr,
    HAS_CAP: tl.constexpr, HAS_WINDOW: tl.constexpr, HAS_STREAMING: tl.constexpr,
    READOUT: tl.constexpr, OFF_SINK: tl.constexpr, MARKED: tl.constexpr, MASKED: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """Continues the running softmax over tiles begin … end - 1 of the program's list."""
    columns = tl.arange(0, DIM_PAD)
    used = columns < DIM
    for tile in range(begin, end):
        start = tl.where(tile < sink_tiles, tile, tile - sink_tiles + first_tile) * TILE
        tokens = start + tl.arange(0, TILE)
        written = tokens <= last_position
        if HAS_WINDOW:
            # Keys that have left the window of every row may have left the cache too.
            written &= first_position - tokens < window
        if HAS_STREAMING:
            written &= (streams == 0) | (tokens < sink) | (first_position - tokens < recent)
        if MASKED:
            block = tl.load(table + tokens // BLOCK_SIZE, mask=written, other=0)
        else:
            block = tl.load(table + tokens // BLOCK_SIZE)
        slots = block.to(tl.int64) * BLOCK_SIZE + tokens % BLOCK_SIZE
        offsets = (slots * N_KV + head // (N_HEADS // N_KV))[:, None] * DIM + columns[None, :]
        if MASKED:
            k = tl.load(key_cache + offsets, mask=written[:, None] & used[None, :], other=0.0)
        else:
            k = tl.load(key_cache + offsets, mask=used[None, :], other=0.0)
        scores = product(query, tl.trans(k), tl.zeros((query.shape[0], TILE), tl.float32))
        scores = exponents(scores, scale, ceiling, HAS_CAP)
        if MASKED:
            visible = tokens[None, :] <= positions[:, None]
            if HAS_WINDOW:
                visible &= positions[:, None] - tokens[None, :] < window
            if HAS_STREAMING:
                near = (tokens < sink)[None, :] | (positions[:, None] - tokens[None, :] < recent)
                visible &= near | (streams == 0)
            scores = tl.where(visible, scores, float("-inf"))
        tile_top = tl.max(scores, axis=1)
        if READOUT:
            tile_key = tl.min(tl.where(scores == tile_top[:, None], tokens[None, :], _NO_KEY), axis=1)
            key = tl.where(tile_top > top, tile_key, key)
        if OFF_SINK:
            off = tl.maximum(off, tl.max(tl.where(tokens[None, :] > 0, scores, float("-inf")), axis=1))
        new_top = tl.maximum(top, tile_top)
        finite = tl.where(new_top > float("-inf"), new_top, 0.0)
        decay = tl.exp2(top - finite)
        weights = tl.exp2(scores - finite[:, None])
        total = total * decay + tl.sum(weights, axis=1)
        if MARKED:
            in_span = (tokens[None, :] >= marked_low[:, None]) & (tokens[None, :] < marked_high[:, None])
            mass = mass * decay + tl.sum(tl.where(in_span, weights, 0.0), axis=1)
        if MASKED:
            v = tl.load(value_cache + offsets, mask=written[:, None] & used[None, :], other=0.0)
        else:
            v = tl.load(value_cache + offsets, mask=used[None, :], other=0.0)
        acc = product(weights.to(v.dtype), v, acc * decay[:, None])
        top = new_top
    return top, total, mass, key, off, acc
