"""Pass 1 projects a tile of rows onto a tile of probes and counts; pass 2 adds the tiles in order."""

import triton
import triton.language as tl

from patchclamp_kernels.dot import product


@triton.jit
def _project(
    x,
    probes,
    row,
    probe,
    inside,
    wanted,
    D: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Returns x·probe of a tile, float32 [BLOCK_T, BLOCK_P]."""
    k = tl.arange(0, BLOCK_D)
    x_rows = x + row.to(tl.int64)[:, None] * D
    probe_rows = probes + probe.to(tl.int64)[None, :] * D
    acc = tl.zeros((BLOCK_T, BLOCK_P), dtype=tl.float32)
    for start in range(0, D, BLOCK_D):
        at = start + k
        a = tl.load(x_rows + at[None, :], mask=inside[:, None] & (at < D)[None, :], other=0.0)
        b = tl.load(probe_rows + at[:, None], mask=wanted[None, :] & (at < D)[:, None], other=0.0)
        acc = product(a, b, acc)
    return acc


@triton.jit(do_not_specialize=["rows", "bins"])
def tile_kernel(
    x,
    probes,
    offsets,
    low,
    high,
    thresholds,
    row_mask,
    values,
    histogram,
    count,
    not_finite,
    fired,
    total,  # [P], or of every row tile [tiles, P]; so are total_squares and largest
    total_squares,
    largest,
    rows,
    number,
    bins,
    D: tl.constexpr,
    HAS_OFFSETS: tl.constexpr,
    HAS_THRESHOLDS: tl.constexpr,
    HAS_MASK: tl.constexpr,
    WRITE_VALUES: tl.constexpr,
    ONLY_TILE: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    # Probe tiles run fastest: those of one row tile share it in L2, where all of the probes fit.
    probe = tl.program_id(0) * BLOCK_P + tl.arange(0, BLOCK_P)
    row = tl.program_id(1) * BLOCK_T + tl.arange(0, BLOCK_T)
    wanted = probe < number
    inside = row < rows
    counted = inside
    if HAS_MASK:
        counted = counted & (tl.load(row_mask + row, mask=inside, other=0) != 0)
    if WRITE_VALUES:
        v = _project(x, probes, row, probe, inside, wanted, D, BLOCK_T, BLOCK_P, BLOCK_D)
    else:
        v = tl.zeros((BLOCK_T, BLOCK_P), dtype=tl.float32)
        if tl.max(counted.to(tl.int32), axis=0) > 0:
            v = _project(x, probes, row, probe, inside, wanted, D, BLOCK_T, BLOCK_P, BLOCK_D)
    if HAS_OFFSETS:
        v += tl.load(offsets + probe, mask=wanted, other=0.0)[None, :]
    if WRITE_VALUES:
        place = row.to(tl.int64)[:, None] * number + probe[None, :]
        tl.store(values + place, v, mask=inside[:, None] & wanted[None, :])

    use = counted[:, None] & wanted[None, :]
    finite = tl.abs(v) < float("inf")  # false for NaN
    good = use & finite
    bottom = tl.load(low + probe, mask=wanted, other=0.0)
    top = tl.load(high + probe, mask=wanted, other=1.0)
    # As torch divides: a value on the edge of a bin falls on the same side on every device.
    scale = tl.div_rn(bins.to(tl.float32), top - bottom)
    # Clamped as a float: what is not finite or does not fit has no integer.
    step = tl.floor((v - bottom[None, :]) * scale[None, :])
    step = tl.where(step > 0.0, step, 0.0)
    step = tl.where(step < bins - 1, step, (bins - 1).to(tl.float32)).to(tl.int32) + 1
    slot = tl.where(v < bottom[None, :], 0, tl.where(v >= top[None, :], bins + 1, step))
    ones = tl.full((BLOCK_T, BLOCK_P), 1, dtype=tl.int64)
    histogram_rows = histogram + probe.to(tl.int64)[None, :] * (bins + 2)
    tl.atomic_add(histogram_rows + slot, ones, mask=good, sem="relaxed")
    tl.atomic_add(count + probe, tl.sum(good.to(tl.int32), axis=0).to(tl.int64), mask=wanted, sem="relaxed")
    broken = tl.sum((use & (finite == 0)).to(tl.int32), axis=0).to(tl.int64)
    tl.atomic_add(not_finite + probe, broken, mask=wanted & (broken > 0), sem="relaxed")
    if HAS_THRESHOLDS:
        above = v > tl.load(thresholds + probe, mask=wanted, other=0.0)[None, :]
        tl.atomic_add(
            fired + probe, tl.sum((good & above).to(tl.int32), axis=0).to(tl.int64), mask=wanted, sem="relaxed"
        )

    number_type = total.dtype.element_ty
    kept = tl.where(good, v, 0.0).to(number_type)
    tile_total = tl.sum(kept, axis=0)
    tile_squares = tl.sum(kept * kept, axis=0)
    tile_largest = tl.max(tl.where(good, v, -float("inf")), axis=0)
    if ONLY_TILE:
        tile_total += tl.load(total + probe, mask=wanted, other=0.0)
        tile_squares += tl.load(total_squares + probe, mask=wanted, other=0.0)
        tile_largest = tl.maximum(tile_largest, tl.load(largest + probe, mask=wanted, other=0.0))
        tl.store(total + probe, tile_total, mask=wanted)
        tl.store(total_squares + probe, tile_squares, mask=wanted)
        tl.store(largest + probe, tile_largest, mask=wanted)
    else:
        place = tl.program_id(1).to(tl.int64) * number + probe
        tl.store(total + place, tile_total, mask=wanted)
        tl.store(total_squares + place, tile_squares, mask=wanted)
        tl.store(largest + place, tile_largest, mask=wanted)


@triton.jit(do_not_specialize=["tiles"])
def combine_kernel(
    tile_totals,  # [tiles, P]
    tile_squares,
    tile_largest,
    total,  # [P]
    total_squares,
    largest,
    tiles,
    number,
    BLOCK_P: tl.constexpr,
    CHUNK: tl.constexpr,
):
    probe = tl.program_id(0) * BLOCK_P + tl.arange(0, BLOCK_P)
    wanted = probe < number
    sums = tl.load(total + probe, mask=wanted, other=0.0)
    squares = tl.load(total_squares + probe, mask=wanted, other=0.0)
    most = tl.load(largest + probe, mask=wanted, other=0.0)
    first = 0
    while first < tiles:
        tile = first + tl.arange(0, CHUNK)
        place = tile.to(tl.int64)[:, None] * number + probe[None, :]
        inside = (tile < tiles)[:, None] & wanted[None, :]
        sums += tl.sum(tl.load(tile_totals + place, mask=inside, other=0.0), axis=0)
        squares += tl.sum(tl.load(tile_squares + place, mask=inside, other=0.0), axis=0)
        most = tl.maximum(most, tl.max(tl.load(tile_largest + place, mask=inside, other=-float("inf")), axis=0))
        first += CHUNK
    tl.store(total + probe, sums, mask=wanted)
    tl.store(total_squares + probe, squares, mask=wanted)
    tl.store(largest + probe, most, mask=wanted)
