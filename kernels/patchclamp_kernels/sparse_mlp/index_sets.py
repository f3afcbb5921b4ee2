"""In this MLP each row computes only the neurons of its own set (CoreInfer, GRIFFIN, static masks).

    h[b, k] = act(x[b]·gate[j]) · (x[b]·up[j])        j = index[which[b], k];  ungated: act(x[b]·up[j])
    y[b]    = Σ_k h[b, k] · down[j] + bias

x is [B, d], gate_up [2·d_ff, d] (gate rows first; [d_ff, d] ungated) and down [d_ff, d] neuron-major, so the three
vectors of a neuron are three contiguous rows. h [B, K] is compact, in the slots of the set and in the dtype of x, 0 in
padding; the halves are public because an engine edits h between them. Weights are float32, float16 or bfloat16 like x,
or Int4Weight.

The op is bound by the bytes of the rows of active neurons, 3·K·d for one set, at B = 1 to 32. The up kernel gives each
program a few neurons and the whole width, so that h needs no second pass; many small programs (1,792 at K = 7168) leave
no long tail. At B = 1 products are summed in registers, one sum for each thread and element, and reduced once at the
end; above, tiles go through tensor cores. The down half is `rows.py`, which also skips neurons that are exactly 0.
"""

from typing import Any

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from patchclamp_kernels.activate import ACTIVATIONS, activate, activate_reference
from patchclamp_kernels.configs import Config, config_for
from patchclamp_kernels.dot import product
from patchclamp_kernels.runtime import accumulation_dtype, check, check_tensor, uses_kernel
from patchclamp_kernels.sparse_mlp.int4 import (
    Int4Weight,
    Weight,
    check_block,
    check_weight,
    dense,
    kernel_arguments,
    load_dense,
    load_scales,
    load_words,
    nibble_units,
)
from patchclamp_kernels.sparse_mlp.rows import MOST_ROWS, bucket_of, weighted_rows
from patchclamp_kernels.sparse_mlp.sets import NeuronSets

_DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def sparse_up_reference(
    x: Tensor,
    gate_up: Weight,
    sets: NeuronSets,
    *,
    activation: str = "silu",
    gated: bool = True,
    bias: Tensor | None = None,
) -> Tensor:
    """Computes all neurons, then takes those of the sets. Rows without a set are 0."""
    acc = accumulation_dtype(x.dtype)
    z = F.linear(x.to(acc), dense(gate_up, acc), None if bias is None else bias.to(acc))
    gate, up = z.chunk(2, dim=1) if gated else (z, None)
    neurons = activate_reference(gate, activation) if up is None else activate_reference(gate, activation) * up
    index, active, _ = sets.of_rows(neurons.shape[1])
    return torch.where(active, neurons.gather(1, index), 0).to(x.dtype)


def sparse_down_reference(h: Tensor, down: Weight, sets: NeuronSets, *, bias: Tensor | None = None) -> Tensor:
    """Computes the dense product of neurons that are 0 outside of the sets. Rows without a set are 0."""
    acc = accumulation_dtype(h.dtype)
    index, active, has_set = sets.of_rows(down.shape[0])
    neurons = torch.zeros(h.shape[0], down.shape[0], dtype=acc, device=h.device)
    neurons.scatter_add_(1, index, torch.where(active, h.to(acc), 0))
    y = neurons @ dense(down, acc)
    if bias is not None:
        y += bias.to(acc)
    return torch.where(has_set[:, None], y, 0).to(h.dtype)


def sparse_mlp_reference(
    x: Tensor,
    gate_up: Weight,
    down: Weight,
    sets: NeuronSets,
    *,
    activation: str = "silu",
    gated: bool = True,
    up_bias: Tensor | None = None,
    down_bias: Tensor | None = None,
) -> Tensor:
    h = sparse_up_reference(x, gate_up, sets, activation=activation, gated=gated, bias=up_bias)
    return sparse_down_reference(h, down, sets, bias=down_bias)


@triton.jit
def _neuron(gate, up, ACTIVATION: tl.constexpr, GATED: tl.constexpr):
    """Returns act(gate) · up, or act(up) of an ungated MLP."""
    z = gate if GATED else up
    value = activate(z, ACTIVATION)
    return value * up if GATED else value


@triton.jit
def _group_sums(
    words, value, x_sum, scales, zeros, row, active, first, groups, GROUP: tl.constexpr, BLOCK: tl.constexpr
):
    """Returns x·w of each group [R, groups]: scale · (Σ q x - zero · Σ x); `value` has the unit of each nibble in x."""
    product = tl.reshape(words * value[None, :, :, :], [row.shape[0], BLOCK // GROUP, GROUP])
    scale, zero = load_scales(scales, zeros, row, active, first, groups, GROUP, BLOCK)
    return scale * (tl.sum(product, axis=2) - zero * x_sum[None, :])


@triton.jit(do_not_specialize=["sets"])
def up_row_kernel(
    x,
    weight,
    scales,
    zeros,
    bias,
    index,
    which,
    h,
    sets,
    slots,
    neurons,
    width,
    stride,
    groups,
    ACTIVATION: tl.constexpr,
    GATED: tl.constexpr,
    GROUP: tl.constexpr,
    BLOCK_J: tl.constexpr,
    BLOCK_D: tl.constexpr,
    STAGES: tl.constexpr,
):
    b = tl.program_id(1).to(tl.int64)
    this_set = tl.load(which + b)
    if (this_set < 0) | (this_set >= sets):
        return
    slot = tl.program_id(0) * BLOCK_J + tl.arange(0, BLOCK_J)
    row = tl.load(index + this_set.to(tl.int64) * slots + slot, mask=slot < slots, other=-1)
    active = (row >= 0) & (row < neurons)
    row = row.to(tl.int64)
    up_row = row + neurons if GATED else row

    # Dense: one sum an element of the tile. Four bits: one a group, whose scale it meets; nothing crosses threads there
    # when a thread holds a group.
    SUMS: tl.constexpr = BLOCK_D if GROUP == 0 else BLOCK_D // GROUP
    gates = tl.zeros([BLOCK_J, SUMS], tl.float32)
    ups = tl.zeros([BLOCK_J, SUMS], tl.float32)
    for start in tl.range(0, width, BLOCK_D, num_stages=STAGES):
        column = start + tl.arange(0, BLOCK_D)
        value = tl.load(x + b * width + column, mask=column < width, other=0.0).to(tl.float32)
        if GROUP == 0:
            inside = active[:, None] & (column < width)[None, :]
            if GATED:
                w = tl.load(weight + row[:, None] * stride + column[None, :], mask=inside, other=0.0)
                gates += w.to(tl.float32) * value[None, :]
            w = tl.load(weight + up_row[:, None] * stride + column[None, :], mask=inside, other=0.0)
            ups += w.to(tl.float32) * value[None, :]
        else:
            value = tl.reshape(value, [SUMS, 8, GROUP // 8])
            x_sum = tl.sum(tl.reshape(value, [SUMS, GROUP]), axis=1)
            value *= nibble_units()[None, :, None]
            if GATED:
                words = load_words(weight, row, active, start, stride, GROUP, BLOCK_D)
                gates += _group_sums(words, value, x_sum, scales, zeros, row, active, start, groups, GROUP, BLOCK_D)
            words = load_words(weight, up_row, active, start, stride, GROUP, BLOCK_D)
            ups += _group_sums(words, value, x_sum, scales, zeros, up_row, active, start, groups, GROUP, BLOCK_D)

    gate = tl.sum(gates, axis=1)
    up = tl.sum(ups, axis=1)
    if bias is not None:
        gate += tl.load(bias + row, mask=active, other=0.0).to(tl.float32)
        up += tl.load(bias + up_row, mask=active, other=0.0).to(tl.float32)
    value = tl.where(active, _neuron(gate, up, ACTIVATION, GATED), 0.0)
    tl.store(h + b * slots + slot, value.to(h.dtype.element_ty), mask=slot < slots)


@triton.jit(do_not_specialize=["rows", "sets"])
def up_tile_kernel(
    x,
    weight,
    scales,
    zeros,
    bias,
    index,
    which,
    h,
    rows,
    sets,
    slots,
    neurons,
    width,
    stride,
    groups,
    ACTIVATION: tl.constexpr,
    GATED: tl.constexpr,
    GROUP: tl.constexpr,
    BLOCK_B: tl.constexpr,
    BLOCK_J: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    this_set = tl.program_id(1)
    b = tl.program_id(2) * BLOCK_B + tl.arange(0, BLOCK_B)
    mine = tl.load(which + b, mask=b < rows, other=-1) == this_set
    if tl.max(mine.to(tl.int32), axis=0) == 0:
        return
    b = b.to(tl.int64)
    slot = tl.program_id(0) * BLOCK_J + tl.arange(0, BLOCK_J)
    row = tl.load(index + this_set.to(tl.int64) * slots + slot, mask=slot < slots, other=-1)
    active = (row >= 0) & (row < neurons)
    row = row.to(tl.int64)
    up_row = row + neurons if GATED else row

    gates = tl.zeros([BLOCK_J, BLOCK_B], tl.float32)
    ups = tl.zeros([BLOCK_J, BLOCK_B], tl.float32)
    for start in range(0, width, BLOCK_D):
        column = start + tl.arange(0, BLOCK_D)
        at = x + b[None, :] * width + column[:, None]
        value = tl.load(at, mask=mine[None, :] & (column < width)[:, None], other=0.0)
        if GATED:
            w = load_dense(
                weight, scales, zeros, row, active, start, width, stride, groups, value.dtype, GROUP, BLOCK_D
            )
            gates = product(w, value, gates)
        w = load_dense(weight, scales, zeros, up_row, active, start, width, stride, groups, value.dtype, GROUP, BLOCK_D)
        ups = product(w, value, ups)

    if bias is not None:
        gates += tl.load(bias + row, mask=active, other=0.0).to(tl.float32)[:, None]
        ups += tl.load(bias + up_row, mask=active, other=0.0).to(tl.float32)[:, None]
    value = tl.where(active[:, None], _neuron(gates, ups, ACTIVATION, GATED), 0.0)
    at = h + b[None, :] * slots + slot[:, None]
    tl.store(at, value.to(h.dtype.element_ty), mask=mine[None, :] & (slot < slots)[:, None])


def default_up_config(rows: int, weight: Weight) -> Config:
    """Four bits are nearly bound by instructions: there, at B = 1, more neurons share what is done to x."""
    if rows == 1:
        shape = (8, 1024) if isinstance(weight, Int4Weight) else (4, 512)
        return Config(blocks={"BLOCK_J": shape[0], "BLOCK_D": shape[1], "STAGES": 3})
    if isinstance(weight, Int4Weight):
        return Config(blocks={"BLOCK_J": 16, "BLOCK_D": 128}, num_stages=5)
    return Config(blocks={"BLOCK_J": 32, "BLOCK_D": 128}, num_stages=4)


def sparse_up(
    x: Tensor,
    gate_up: Weight,
    sets: NeuronSets,
    *,
    activation: str = "silu",
    gated: bool = True,
    bias: Tensor | None = None,
    out: Tensor | None = None,
    config: Config | None = None,
) -> Tensor:
    """Returns the neurons of the sets: h [B, K] in the dtype of x. `bias` is [2·d_ff], or [d_ff] ungated.

    Rows without a set are left alone in `out`, and are 0 where there is no `out`. Raises ValueError naming the
    argument.
    """
    check_tensor("x", x, shape=(None, None), dtypes=_DTYPES, device=x.device)
    sets.check(x)
    (rows, width), (set_count, slots) = x.shape, sets.index.shape
    check_weight("gate_up", gate_up, shape=(None, width), like=x)
    check(activation in ACTIVATIONS, f"activation is {activation!r}, not one of {', '.join(ACTIVATIONS)}")
    check(not gated or gate_up.shape[0] % 2 == 0, f"gate_up has {gate_up.shape[0]} rows, not two for each neuron")
    if bias is not None:
        check_tensor("bias", bias, shape=(gate_up.shape[0],), dtypes=(x.dtype,), device=x.device)
    h = _output("out", out, (rows, slots), x)
    if not uses_kernel(x):
        value = sparse_up_reference(x, gate_up, sets, activation=activation, gated=gated, bias=bias)
        return _fill(h, value, sets)
    if h.numel() == 0 or set_count == 0:
        return h
    bucket = bucket_of(rows, slots, width, gate_up)
    chosen = config or config_for("sparse_up", bucket, default_up_config(rows, gate_up), x.device)
    check_block("BLOCK_D", chosen.blocks["BLOCK_D"], gate_up)
    arguments: dict[str, Any] = {
        **kernel_arguments(gate_up),
        **chosen.blocks,
        "x": x,
        "bias": bias,
        "index": sets.index,
        "which": sets.which,
        "h": h,
        "sets": set_count,
        "slots": slots,
        "neurons": gate_up.shape[0] // 2 if gated else gate_up.shape[0],
        "width": width,
        "ACTIVATION": activation,
        "GATED": gated,
        "num_warps": chosen.num_warps,
        "num_stages": chosen.num_stages,
    }
    tiles = triton.cdiv(slots, chosen.blocks["BLOCK_J"])
    if rows == 1:
        up_row_kernel[(tiles, rows)](**arguments)
    else:
        block_b = 16 if rows <= 16 else MOST_ROWS
        up_tile_kernel[(tiles, set_count, triton.cdiv(rows, block_b))](**arguments, rows=rows, BLOCK_B=block_b)
    return h


def sparse_down(
    h: Tensor,
    down: Weight,
    sets: NeuronSets,
    *,
    bias: Tensor | None = None,
    out: Tensor | None = None,
    config: Config | None = None,
) -> Tensor:
    """Returns y [B, d] of the compact neurons h [B, K] of the sets. `down` [d_ff, d] is neuron-major, `bias` is [d].

    Rows without a set are left alone in `out`, and are 0 where there is no `out`. Raises ValueError naming the
    argument.
    """
    check_tensor("h", h, shape=(None, sets.index.shape[-1]), dtypes=_DTYPES, device=h.device)
    sets.check(h)
    check(len(down.shape) == 2, f"down has shape {list(down.shape)}, not [*, *]")
    width = down.shape[1]
    check_weight("down", down, shape=(None, width), like=h)
    if bias is not None:
        check_tensor("bias", bias, shape=(width,), dtypes=(h.dtype,), device=h.device)
    y = _output("out", out, (h.shape[0], width), h)
    if not uses_kernel(h):
        return _fill(y, sparse_down_reference(h, down, sets, bias=bias), sets)
    weighted_rows("sparse_down", h, down, y, sets=sets, bias=bias, config=config)
    return y


def sparse_mlp(
    x: Tensor,
    gate_up: Weight,
    down: Weight,
    sets: NeuronSets,
    *,
    activation: str = "silu",
    gated: bool = True,
    up_bias: Tensor | None = None,
    down_bias: Tensor | None = None,
    out: Tensor | None = None,
    return_neurons: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Returns y [B, d], or (y, h) with `return_neurons`, by `sparse_up` and `sparse_down`, which document the rest."""
    wanted = 2 * down.shape[0] if gated else down.shape[0]
    check(gate_up.shape[0] == wanted, f"gate_up has {gate_up.shape[0]} rows, not {wanted} for {down.shape[0]} neurons")
    check(down.shape[-1] == x.shape[-1], f"down has {down.shape[-1]} columns, not {x.shape[-1]} like x")
    h = torch.empty(x.shape[0], sets.index.shape[-1], dtype=x.dtype, device=x.device)
    if return_neurons:
        h.zero_()  # rows without a set; the down half does not look at them
    sparse_up(x, gate_up, sets, activation=activation, gated=gated, bias=up_bias, out=h)
    y = sparse_down(h, down, sets, bias=down_bias, out=out)
    return (y, h) if return_neurons else y


def _output(name: str, out: Tensor | None, shape: tuple[int, int], like: Tensor) -> Tensor:
    if out is None:
        return torch.zeros(shape, dtype=like.dtype, device=like.device)
    check_tensor(name, out, shape=shape, dtypes=(like.dtype,), device=like.device)
    return out


def _fill(out: Tensor, value: Tensor, sets: NeuronSets) -> Tensor:
    has_set = (sets.which >= 0) & (sets.which < sets.index.shape[0])
    return out.copy_(torch.where(has_set[:, None], value, out))
