"""The sum of weighted rows y[b] = Σ_j a[b, j] · W[row(b, j)] + bias ends both sparse reads: the down projection of a
set of neurons (a = h, row = index) and a linear layer with a threshold on its input (a = x, row = j).

A row of W is read only where it is wanted; at B = 1 also only where a is not exactly 0, which is all that the exact
sparsity of ReLU models needs. The load is masked, which costs an instruction and no bytes; a compacted list would cost
a launch (of the order of 2 µs, where a whole projection takes 5 to 20), and would make the order of the sums of a row
depend on its neighbours. As it is, slot j always goes to the same split and the same place in it, so the bits of a row
depend on its own a, set and threshold, and on the shapes.

The op is bound by the bytes of the rows read. The slots are split over programs to keep enough loads in flight; each
split leaves float32 sums in scratch [splits, B, columns], which a second kernel adds in a fixed order.

There are two forms. A *row* kernel (B = 1) keeps a [slots, columns] tile of sums in registers, so that nothing is
reduced across threads before the end. A *tile* kernel takes up to 32 rows of the batch at once in tensor cores: a
program belongs to one set, and the rows of others are masked, which costs arithmetic that is idle anyway and saves
sorting the batch.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from patchclamp_kernels.configs import Config, config_for
from patchclamp_kernels.dot import product
from patchclamp_kernels.sparse_mlp.int4 import (
    Int4Weight,
    Weight,
    check_block,
    kernel_arguments,
    kind,
    load_dense,
    load_scales,
    load_words,
    nibble_units,
)
from patchclamp_kernels.sparse_mlp.sets import NeuronSets

MOST_ROWS = 32  # of a tile
REDUCE = Config(blocks={"BLOCK_C": 64})


@triton.jit(do_not_specialize=["sets"])
def weighted_row_kernel(
    a,
    weight,
    scales,
    zeros,
    index,
    which,
    thresholds,
    channel_scale,
    partial,  # float32 [splits, rows, columns]
    threshold,
    sets,
    slots,
    weight_rows,
    columns,
    stride,
    groups,
    per_split,
    GROUP: tl.constexpr,
    BLOCK_J: tl.constexpr,
    BLOCK_C: tl.constexpr,
    STAGES: tl.constexpr,
):
    first = tl.program_id(0) * BLOCK_C
    split = tl.program_id(1)
    b = tl.program_id(2).to(tl.int64)
    begin = split * per_split
    end = tl.minimum(begin + per_split, slots)
    set_of_row = tl.program_id(2)
    if index is not None:
        set_of_row = tl.load(which + b)
        # A row without a set has nothing to read; the reduction does not look at its sums.
        end = tl.where((set_of_row >= 0) & (set_of_row < sets), end, begin)
    elif thresholds is not None:
        threshold = tl.load(thresholds + b)

    column = first + tl.arange(0, BLOCK_C)
    if GROUP == 0:
        total = tl.zeros([BLOCK_J, BLOCK_C], tl.float32)
    else:
        total = tl.zeros([BLOCK_J, BLOCK_C // GROUP, 8, GROUP // 8], tl.float32)
        zero_total = tl.zeros([BLOCK_J, BLOCK_C // GROUP], tl.float32)

    for start in tl.range(begin, end, BLOCK_J, num_stages=STAGES):
        slot = start + tl.arange(0, BLOCK_J)
        inside = slot < end
        value = tl.load(a + b * slots + slot, mask=inside, other=0.0).to(tl.float32)
        if index is not None:
            row = tl.load(index + set_of_row.to(tl.int64) * slots + slot, mask=inside, other=-1)
            active = (row >= 0) & (row < weight_rows) & (value != 0)
        else:
            row = slot
            score = tl.abs(value)
            if channel_scale is not None:
                score *= tl.load(channel_scale + slot, mask=inside, other=0.0)
            active = (value != 0) & ~(score < threshold)
        value = tl.where(active, value, 0.0)
        row = row.to(tl.int64)
        if GROUP == 0:
            at = row[:, None] * stride + column[None, :]
            w = tl.load(weight + at, mask=active[:, None] & (column < columns)[None, :], other=0.0)
            total += value[:, None] * w.to(tl.float32)
        else:
            # The scale goes to the coefficient, of which there are fewer; the zeros are one number a group.
            words = load_words(weight, row, active, first, stride, GROUP, BLOCK_C)
            scale, zero = load_scales(scales, zeros, row, active, first, groups, GROUP, BLOCK_C)
            scaled = value[:, None] * scale
            total += scaled[:, :, None, None] * words
            zero_total += scaled * zero

    y = tl.sum(total, axis=0)
    if GROUP != 0:
        y = y * nibble_units()[None, :, None] - tl.sum(zero_total, axis=0)[:, None, None]
        y = tl.reshape(y, [BLOCK_C])
    out = partial + (split.to(tl.int64) * tl.num_programs(2) + b) * columns
    tl.store(out + column, y, mask=column < columns)


@triton.jit(do_not_specialize=["rows", "sets"])
def weighted_tile_kernel(
    a,
    weight,
    scales,
    zeros,
    index,
    which,
    thresholds,
    channel_scale,
    partial,
    threshold,
    rows,
    sets,
    slots,
    weight_rows,
    columns,
    stride,
    groups,
    per_split,
    GROUP: tl.constexpr,
    BLOCK_B: tl.constexpr,
    BLOCK_J: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    first = tl.program_id(0) * BLOCK_C
    split = tl.program_id(1)
    # Without sets there is one: every row is in it.
    this_set = tl.program_id(2) % sets
    b = tl.program_id(2) // sets * BLOCK_B + tl.arange(0, BLOCK_B)
    mine = b < rows
    if index is not None:
        mine = tl.load(which + b, mask=mine, other=-1) == this_set
    if tl.max(mine.to(tl.int32), axis=0) == 0:
        return
    b = b.to(tl.int64)
    begin = split * per_split
    end = tl.minimum(begin + per_split, slots)
    limit = threshold if thresholds is None else tl.load(thresholds + b, mask=mine, other=0.0)[:, None]

    column = first + tl.arange(0, BLOCK_C)
    total = tl.zeros([BLOCK_B, BLOCK_C], tl.float32)
    for start in range(begin, end, BLOCK_J):
        slot = start + tl.arange(0, BLOCK_J)
        inside = slot < end
        value = tl.load(a + b[:, None] * slots + slot[None, :], mask=mine[:, None] & inside[None, :], other=0.0)
        if index is not None:
            # Not asking whether h is 0 leaves the next index and rows free to be fetched ahead.
            row = tl.load(index + this_set.to(tl.int64) * slots + slot, mask=inside, other=-1)
            active = (row >= 0) & (row < weight_rows)
            value = tl.where(active[None, :], value, 0.0)
        else:
            row = slot
            score = tl.abs(value.to(tl.float32))
            if channel_scale is not None:
                score *= tl.load(channel_scale + slot, mask=inside, other=0.0)[None, :]
            value = tl.where(score < limit, 0.0, value)
            active = tl.max((value != 0).to(tl.int32), axis=0) != 0
        value = value.to(a.dtype.element_ty)
        row = row.to(tl.int64)
        w = load_dense(weight, scales, zeros, row, active, first, columns, stride, groups, value.dtype, GROUP, BLOCK_C)
        total = product(value, w, total)

    out = partial + (split.to(tl.int64) * rows + b[:, None]) * columns + column[None, :]
    tl.store(out, total, mask=mine[:, None] & (column < columns)[None, :])


@triton.jit(do_not_specialize=["rows", "sets", "splits"])
def ordered_sum_kernel(
    partial, which, bias, out, sets, splits, rows, columns, BLOCK_S: tl.constexpr, BLOCK_C: tl.constexpr
):
    column = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    b = tl.program_id(1).to(tl.int64)
    if which is not None:
        set_of_row = tl.load(which + b)
        if (set_of_row < 0) | (set_of_row >= sets):
            return
    split = tl.arange(0, BLOCK_S).to(tl.int64)
    at = (split[:, None] * rows + b) * columns + column[None, :]
    # One tree over all splits: its shape is fixed by their number, and all loads are under way at once.
    terms = tl.load(partial + at, mask=(split < splits)[:, None] & (column < columns)[None, :], other=0.0)
    y = tl.sum(terms, axis=0)
    if bias is not None:
        y += tl.load(bias + column, mask=column < columns, other=0.0).to(tl.float32)
    tl.store(out + b * columns + column, y.to(out.dtype.element_ty), mask=column < columns)


def default_config(rows: int, weight: Weight) -> Config:
    """PROGRAMS is the number that the slots are split for; more of them keep more loads in flight and need more scratch
    memory, which also grows with the rows of the batch, so a tile is split less."""
    if rows == 1:
        width = 512 if isinstance(weight, Int4Weight) else 256
        return Config(blocks={"BLOCK_J": 16, "BLOCK_C": width, "PROGRAMS": 768, "STAGES": 3})
    # The index of a row is fetched before the row: seven stages are three of each.
    return Config(blocks={"BLOCK_J": 32, "BLOCK_C": 128, "PROGRAMS": 256}, num_stages=7)


def split_slots(slots: int, columns: int, config: Config) -> tuple[int, int]:
    """Returns the number of splits and the slots of each. They depend on the shapes alone, never on the batch."""
    blocks = config.blocks
    wanted = triton.cdiv(blocks["PROGRAMS"], triton.cdiv(columns, blocks["BLOCK_C"]))
    tiles = triton.cdiv(slots, blocks["BLOCK_J"])
    per_split = triton.cdiv(tiles, min(wanted, 256)) * blocks["BLOCK_J"]
    return triton.cdiv(slots, per_split) if slots else 0, per_split


def scratch(shape: tuple[int, ...], device: torch.device) -> Tensor:
    return torch.empty(shape, dtype=torch.float32, device=device)


def bucket_of(rows: int, slots: int, columns: int, weight: Weight) -> str:
    form = "row" if rows == 1 else "tile16" if rows <= 16 else "tile32"
    return f"{kind(weight)}_{form}_{slots}x{columns}"


def weighted_rows(
    op: str,
    a: Tensor,
    weight: Weight,
    out: Tensor,
    *,
    sets: NeuronSets | None = None,
    threshold: float | Tensor = 0.0,
    channel_scale: Tensor | None = None,
    bias: Tensor | None = None,
    config: Config | None = None,
) -> None:
    """Launches with arguments that were checked: a [B, slots], weight [rows, columns], out [B, columns]."""
    (rows, slots), (weight_rows, columns) = a.shape, weight.shape
    if rows == 0 or columns == 0:
        return
    chosen = config or config_for(op, bucket_of(rows, slots, columns, weight), default_config(rows, weight), a.device)
    check_block("BLOCK_C", chosen.blocks["BLOCK_C"], weight)
    splits, per_split = split_slots(slots, columns, chosen)
    partial = scratch((splits, rows, columns), a.device)
    per_row = isinstance(threshold, Tensor)
    arguments: dict[str, Any] = {
        **kernel_arguments(weight),
        "a": a,
        "index": None if sets is None else sets.index,
        "which": None if sets is None else sets.which,
        "thresholds": threshold if per_row else None,
        "channel_scale": channel_scale,
        "partial": partial,
        "threshold": 0.0 if per_row else threshold,
        "sets": 1 if sets is None else sets.index.shape[0],
        "slots": slots,
        "weight_rows": weight_rows,
        "columns": columns,
        "per_split": per_split,
        "num_warps": chosen.num_warps,
        "num_stages": chosen.num_stages,
    }
    blocks = {name: size for name, size in chosen.blocks.items() if name != "PROGRAMS"}
    tiles = triton.cdiv(columns, chosen.blocks["BLOCK_C"])
    if arguments["sets"] == 0:
        return
    if splits and rows == 1:
        weighted_row_kernel[(tiles, splits, rows)](**arguments, **blocks)
    elif splits:
        block_b = 16 if rows <= 16 else MOST_ROWS
        grid = (tiles, splits, arguments["sets"] * triton.cdiv(rows, block_b))
        weighted_tile_kernel[grid](**arguments, **blocks, rows=rows, BLOCK_B=block_b)
    ordered_sum_kernel[(triton.cdiv(columns, REDUCE.blocks["BLOCK_C"]), rows)](
        partial,
        arguments["which"],
        bias,
        out,
        arguments["sets"],
        splits,
        rows,
        columns,
        BLOCK_S=triton.next_power_of_2(max(splits, 1)),
        BLOCK_C=REDUCE.blocks["BLOCK_C"],
        num_warps=REDUCE.num_warps,
    )
