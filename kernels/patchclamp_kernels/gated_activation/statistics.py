"""This op accumulates statistics of watched neurons over the rows of a step.

    fired[w] += #{t : a[t, n_w] > threshold_w}
    total[w] += Σ_t a[t, n_w]
    largest[w] = max(largest[w], max_t a[t, n_w])

neurons [T, d_ff] are read after all edits; rows with row_mask 0 are left out. An instance owns a tile of the watched
neurons and walks the rows in order, so that sums have one order and nothing is atomic. It gathers single elements, of
which a 32-byte sector has one unless neighbours are watched, so many rows at a time are in flight.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from patchclamp_kernels.cases import CompileCase, TuningCase
from patchclamp_kernels.configs import Config, config_for
from patchclamp_kernels.gated_activation.activation import DTYPES
from patchclamp_kernels.runtime import check_tensor, uses_kernel

DEFAULT = Config({"BLOCK_ROWS": 128, "BLOCK_WATCHED": 16}, num_warps=4, num_stages=1)


def neuron_statistics_reference(
    neurons: Tensor,
    watched: Tensor,
    thresholds: Tensor,
    row_mask: Tensor | None,
    *,
    fired: Tensor,
    total: Tensor,
    largest: Tensor,
) -> None:
    a = neurons[:, watched.long()].to(total.dtype)
    if row_mask is not None:
        a = a[row_mask.bool()]
    fired += (a > thresholds).sum(0)
    total += a.sum(0)
    if len(a):
        largest.copy_(torch.maximum(largest, a.amax(0).to(largest.dtype)))


@triton.jit
def _larger(a, b):
    return tl.maximum(a, b, propagate_nan=tl.PropagateNan.ALL)


@triton.jit(
    do_not_specialize=["rows", "n_watched"],
    do_not_specialize_on_alignment=["watched", "thresholds", "row_mask", "fired", "total", "largest"],
)
def _neuron_statistics_kernel(
    neurons,
    watched,
    thresholds,
    row_mask,
    fired,
    total,
    largest,
    rows,
    d_ff,
    n_watched,
    MASKED: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_WATCHED: tl.constexpr,
):
    w = tl.program_id(0) * BLOCK_WATCHED + tl.arange(0, BLOCK_WATCHED)
    there = w < n_watched
    neuron = tl.load(watched + w, mask=there, other=0)
    threshold = tl.load(thresholds + w, mask=there, other=0.0)
    count = tl.zeros([BLOCK_WATCHED], tl.int32)
    summed = tl.load(total + w, mask=there, other=0.0)
    most = tl.load(largest + w, mask=there, other=0.0)
    start = 0
    while start < rows:
        row = start + tl.arange(0, BLOCK_ROWS)
        seen = row < rows
        if MASKED:
            seen = seen & (tl.load(row_mask + row, mask=seen, other=0) != 0)
        wanted = seen[:, None] & there[None, :]
        at = neurons + row.to(tl.int64)[:, None] * d_ff + neuron[None, :]
        a = tl.load(at, mask=wanted, other=0.0).to(tl.float32)
        count += tl.sum((wanted & (a > threshold[None, :])).to(tl.int32), 0)
        summed += tl.sum(a.to(total.dtype.element_ty), 0)
        most = _larger(most, tl.reduce(tl.where(wanted, a, float("-inf")), 0, _larger))
        start += BLOCK_ROWS
    tl.store(fired + w, tl.load(fired + w, mask=there, other=0) + count, mask=there)
    tl.store(total + w, summed, mask=there)
    tl.store(largest + w, most, mask=there)


def neuron_statistics(
    neurons: Tensor,
    watched: Tensor,
    thresholds: Tensor,
    row_mask: Tensor | None = None,
    *,
    fired: Tensor,
    total: Tensor,
    largest: Tensor,
    config: Config | None = None,
) -> None:
    """Accumulates the W `watched` neurons (int32 [W], in any order, below d_ff) of neurons [T, d_ff] in place.

    thresholds float32 [W]; row_mask int32 or bool [T], all rows when None; fired int64 [W]; total float32 or float64
    [W], which is also what sums are made in; largest float32 [W], -inf before the first row. A NaN shows in total and
    largest, and never fires. Raises ValueError for a wrong argument.
    """
    device = neurons.device
    check_tensor("neurons", neurons, shape=(None, None), dtypes=DTYPES, device=device)
    rows, d_ff = neurons.shape
    check_tensor("watched", watched, shape=(None,), dtypes=(torch.int32,), device=device)
    n = watched.shape[0]
    check_tensor("thresholds", thresholds, shape=(n,), dtypes=(torch.float32,), device=device)
    if row_mask is not None:
        check_tensor("row_mask", row_mask, shape=(rows,), dtypes=(torch.int32, torch.bool), device=device)
    check_tensor("fired", fired, shape=(n,), dtypes=(torch.int64,), device=device)
    check_tensor("total", total, shape=(n,), dtypes=(torch.float32, torch.float64), device=device)
    check_tensor("largest", largest, shape=(n,), dtypes=(torch.float32,), device=device)
    if not uses_kernel(neurons):
        neuron_statistics_reference(neurons, watched, thresholds, row_mask, fired=fired, total=total, largest=largest)
        return
    if n == 0 or rows == 0:
        return
    config = config or config_for("neuron_statistics", "", DEFAULT, device)
    _neuron_statistics_kernel[(triton.cdiv(n, config.blocks["BLOCK_WATCHED"]),)](
        neurons,
        watched,
        thresholds,
        row_mask,
        fired,
        total,
        largest,
        rows,
        d_ff,
        n,
        MASKED=row_mask is not None,
        **config.blocks,
        num_warps=config.num_warps,
        num_stages=config.num_stages,
    )


def compile_cases() -> list[CompileCase]:
    signature = {
        "neurons": "*bf16",
        "watched": "*i32",
        "thresholds": "*fp32",
        "row_mask": "*i32",
        "fired": "*i64",
        "total": "*fp64",
        "largest": "*fp32",
        **dict.fromkeys(("rows", "d_ff", "n_watched"), "i32"),
    }
    constexprs = {"MASKED": True, **DEFAULT.blocks}
    return [
        CompileCase(
            "neuron_statistics", _neuron_statistics_kernel, signature, constexprs, DEFAULT, ("d_ff",), vector_bytes=0
        )
    ]


def tuning_cases(device: torch.device) -> list[TuningCase]:
    candidates = tuple(
        Config({"BLOCK_ROWS": rows, "BLOCK_WATCHED": watched}, num_warps=warps, num_stages=1)
        for rows in (32, 64, 128, 256)
        for watched in (8, 16, 32)
        for warps in (4, 8)
    )
    neurons = torch.randn((256, 14336), device=device).bfloat16()
    watched = torch.arange(0, 14336, 14, dtype=torch.int32, device=device)
    thresholds = torch.zeros(len(watched), device=device)
    fired, total = (torch.zeros(len(watched), dtype=d, device=device) for d in (torch.int64, torch.float64))
    largest = torch.full((len(watched),), -torch.inf, device=device)

    def run(config: Config) -> None:
        neuron_statistics(neurons, watched, thresholds, fired=fired, total=total, largest=largest, config=config)

    return [TuningCase("neuron_statistics", "", candidates, run)]
