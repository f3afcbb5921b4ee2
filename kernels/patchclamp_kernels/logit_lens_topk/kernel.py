"""These kernels compute the norm of a row, the top tokens of a tile of logits, and the merge of the tiles of a row."""

import triton
import triton.language as tl

from patchclamp_kernels.dot import product

# A logit of -inf is told from what a tile has not, or no more, to offer.
LOWEST = tl.constexpr(-3.4028234663852886e38)


@triton.jit
def norm_kernel(x, weight, bias, out, d, eps, HAS_BIAS: tl.constexpr, BLOCK_D: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    k = tl.arange(0, BLOCK_D)
    inside = k < d
    h = tl.load(x + row * d + k, mask=inside, other=0.0).to(tl.float32)
    if HAS_BIAS:
        h = tl.where(inside, h - tl.sum(h, axis=0) / d, 0.0)
    h = h * (1.0 / tl.sqrt_rn(tl.sum(h * h, axis=0) / d + eps))
    h = h * tl.load(weight + k, mask=inside, other=0.0).to(tl.float32)
    if HAS_BIAS:
        h += tl.load(bias + k, mask=inside, other=0.0).to(tl.float32)
    tl.store(out + row * d + k, h.to(out.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["rows", "k"])
def tile_kernel(
    h,
    unembedding,
    tile_max,  # float32 [T, tiles]
    tile_sum,  # float32 [T, tiles]
    candidate_values,  # float32 [T, tiles, k], descending
    candidate_ids,  # int32 [T, tiles, k]
    rows,
    vocabulary,
    k,
    soft_cap,
    D: tl.constexpr,
    HAS_CAP: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    row = tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)
    tile = tl.program_id(1)
    token = tile * BLOCK_V + tl.arange(0, BLOCK_V)
    inside = row < rows
    known = token < vocabulary
    at = tl.arange(0, BLOCK_D)
    h_rows = h + row.to(tl.int64)[:, None] * D
    token_rows = unembedding + token.to(tl.int64)[None, :] * D
    logits = tl.zeros((BLOCK_T, BLOCK_V), dtype=tl.float32)
    for start in range(0, D, BLOCK_D):
        i = start + at
        a = tl.load(h_rows + i[None, :], mask=inside[:, None] & (i < D)[None, :], other=0.0)
        b = tl.load(token_rows + i[:, None], mask=known[None, :] & (i < D)[:, None], other=0.0)
        logits = product(a, b, logits)
    if HAS_CAP:
        # tanh z = 1 - 2 / (e^2z + 1), which tends to the right limits where e^2z overflows.
        logits = soft_cap * (1.0 - 2.0 / (tl.exp(2.0 * (logits / soft_cap)) + 1.0))
    logits = tl.where(known[None, :], logits, -float("inf"))

    peak = tl.max(logits, axis=1)
    # A tile of nothing but -inf has the sum 0, not NaN; NaN and +inf make the sum NaN.
    shift = tl.where(peak == -float("inf"), 0.0, peak)
    place = row.to(tl.int64) * tl.num_programs(1) + tile
    tl.store(tile_max + place, peak, mask=inside)
    tl.store(tile_sum + place, tl.sum(tl.exp(logits - shift[:, None]), axis=1), mask=inside)
    left = tl.where(known[None, :], tl.maximum(logits, LOWEST), -float("inf"))
    i = 0
    while i < k:
        best = tl.max(left, axis=1)
        id = tl.min(tl.where(left == best[:, None], token[None, :], 2147483647), axis=1)
        tl.store(candidate_values + place * k + i, best, mask=inside)
        tl.store(candidate_ids + place * k + i, id, mask=inside)
        left = tl.where(token[None, :] == id[:, None], -float("inf"), left)
        i += 1


@triton.jit(do_not_specialize=["k"])
def merge_kernel(
    tile_max,
    tile_sum,
    candidate_values,
    candidate_ids,
    values,  # float32 [T, k]
    ids,  # int64 [T, k]
    log_totals,  # float32 [T]
    tiles,
    k,
    TILES: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    tile = tl.arange(0, TILES)
    inside = tile < tiles
    peaks = tl.load(tile_max + row * tiles + tile, mask=inside, other=-float("inf"))
    sums = tl.load(tile_sum + row * tiles + tile, mask=inside, other=0.0)
    peak = tl.max(peaks, axis=0)
    shift = tl.where(peak == -float("inf"), 0.0, peak)
    total = tl.sum(sums * tl.exp(peaks - shift), axis=0)
    finite = total > 0.0
    log_of_total = tl.log(total)
    tl.store(log_totals + row, tl.where(finite, peak + log_of_total, float("nan")))

    first = row * tiles * k
    taken = tl.zeros((TILES,), dtype=tl.int32)
    heads = tl.load(candidate_values + first + tile * k, mask=inside, other=-float("inf"))
    i = 0
    while i < k:
        best = tl.max(heads, axis=0)
        # The lowest tile among equals has the lowest id. In a row of NaN there is none: any tile will do.
        winner = tl.min(tl.where(heads == best, tile, tiles - 1), axis=0)
        rank = tl.sum(tl.where(tile == winner, taken, 0), axis=0)
        at = first + winner * k + rank
        id = tl.load(candidate_ids + at, mask=rank < k, other=-1)
        following = tl.load(candidate_values + at + 1, mask=rank + 1 < k, other=-float("inf"))
        heads = tl.where(tile == winner, following, heads)
        taken += (tile == winner).to(tl.int32)
        # The difference first: it is exact to float32 however large the logits are.
        value = tl.where(best <= LOWEST, -float("inf"), (best - peak) - log_of_total)
        tl.store(values + row * k + i, tl.where(finite, value, float("nan")))
        tl.store(ids + row * k + i, tl.where(finite, id, -1).to(tl.int64))
        i += 1
