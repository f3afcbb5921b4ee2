"""This tells which keys a row sees, in tiles and one by one; the decode and the prefill kernel share it."""

import triton
import triton.language as tl


@triton.jit
def key_tiles(
    first_position,
    last_position,
    all_streaming,
    window,
    sink,
    recent,
    TILE: tl.constexpr,
    HAS_WINDOW: tl.constexpr,
    HAS_STREAMING: tl.constexpr,
):
    """Returns tiles: rows at first_position … last_position only see keys of tiles [0, sink_tiles) and [first, end)."""
    end = tl.cdiv(tl.maximum(last_position + 1, 0), TILE)
    low = 0
    if HAS_WINDOW:
        low = tl.maximum(first_position - window + 1, 0)
    sink_tiles = 0
    if HAS_STREAMING:
        sink_tiles = tl.where(all_streaming & (low < sink), tl.minimum(tl.cdiv(sink, TILE), end), 0)
        low = tl.where(all_streaming, tl.maximum(low, first_position - recent + 1), low)
    first = tl.maximum(low // TILE, sink_tiles)
    return sink_tiles, first, end
