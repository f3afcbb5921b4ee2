"""This is the checked wrapper, and what it launches by default."""

import torch
import triton
from torch import Tensor

from patchclamp_kernels.configs import Config, config_for
from patchclamp_kernels.probe_statistics.kernel import combine_kernel, tile_kernel
from patchclamp_kernels.probe_statistics.reference import probe_statistics_reference
from patchclamp_kernels.runtime import check, check_tensor, uses_kernel

OP = "probe_statistics"
ACTIVATIONS = (torch.float32, torch.float16, torch.bfloat16)
SUMS = (torch.float32, torch.float64)


def probe_statistics(
    x: Tensor,
    probes: Tensor,
    *,
    low: Tensor,
    high: Tensor,
    histogram: Tensor,
    count: Tensor,
    not_finite: Tensor,
    total: Tensor,
    total_squares: Tensor,
    largest: Tensor,
    offsets: Tensor | None = None,
    row_mask: Tensor | None = None,
    thresholds: Tensor | None = None,
    fired: Tensor | None = None,
    return_values: bool = False,
    out_values: Tensor | None = None,
    config: Config | None = None,
) -> Tensor | None:
    """Adds the rows of x [T, d] to the statistics of probes [P, d], in place.

    `low`, `high` (range of the histogram), `offsets`, `thresholds`, and `largest`, which starts at -inf, are float32
    [P]. `histogram` [P, bins + 2] is int64, and its first and last slots hold what lies outside; `count`, `not_finite`
    and `fired`, which comes with `thresholds`, are int64 [P]. `total` and `total_squares` are float32 or float64 [P].
    `row_mask` is int32 [T]. A range that is empty leaves only the first and last slot.

    Returns values float32 [T, P], of masked rows too, where `return_values` is set or `out_values` given. One stream at
    a time may add to a set of statistics. Raises ValueError.
    """
    check(x.ndim == 2, f"x has shape {list(x.shape)}, not [*, *]")
    rows, d = x.shape
    device = x.device
    check_tensor("x", x, shape=(rows, d), dtypes=ACTIVATIONS, device=device)
    check_tensor("probes", probes, shape=(None, d), dtypes=(x.dtype,), device=device)
    number = probes.shape[0]
    check((thresholds is None) == (fired is None), "thresholds and fired come together")
    numbers = {"low": low, "high": high, "largest": largest, "offsets": offsets, "thresholds": thresholds}
    counts = {"count": count, "not_finite": not_finite, "fired": fired}
    for kind, tensors in ((torch.float32, numbers), (torch.int64, counts)):
        for name, tensor in tensors.items():
            if tensor is not None:
                check_tensor(name, tensor, shape=(number,), dtypes=(kind,), device=device)
    check_tensor("total", total, shape=(number,), dtypes=SUMS, device=device)
    check_tensor("total_squares", total_squares, shape=(number,), dtypes=(total.dtype,), device=device)
    check_tensor("histogram", histogram, shape=(number, None), dtypes=(torch.int64,), device=device)
    check(histogram.shape[1] >= 3, f"histogram has {histogram.shape[1]} slots, not at least 3")
    if row_mask is not None:
        check_tensor("row_mask", row_mask, shape=(rows,), dtypes=(torch.int32,), device=device)
    if out_values is not None:
        check_tensor("out_values", out_values, shape=(rows, number), dtypes=(torch.float32,), device=device)
    elif return_values:
        out_values = torch.empty((rows, number), dtype=torch.float32, device=device)
    if rows == 0 or number == 0:
        return out_values
    if not uses_kernel(x):
        values = probe_statistics_reference(
            x,
            probes,
            low=low,
            high=high,
            histogram=histogram,
            count=count,
            not_finite=not_finite,
            total=total,
            total_squares=total_squares,
            largest=largest,
            offsets=offsets,
            row_mask=row_mask,
            thresholds=thresholds,
            fired=fired,
        )
        return None if out_values is None else out_values.copy_(values)

    if config is None:
        config = config_for(OP, bucket(rows, number, d, x.dtype), default(rows, x.dtype), device)
    tiles = triton.cdiv(rows, config.blocks["BLOCK_T"])
    sums = (total, total_squares, largest)
    partial = sums if tiles == 1 else tuple(torch.empty((tiles, number), dtype=s.dtype, device=device) for s in sums)
    tile_kernel[(triton.cdiv(number, config.blocks["BLOCK_P"]), tiles)](
        x,
        probes,
        low if offsets is None else offsets,
        low,
        high,
        low if thresholds is None else thresholds,
        low if row_mask is None else row_mask,
        low if out_values is None else out_values,
        histogram,
        count,
        not_finite,
        count if fired is None else fired,
        *partial,
        rows,
        number,
        histogram.shape[1] - 2,
        D=d,
        HAS_OFFSETS=offsets is not None,
        HAS_THRESHOLDS=thresholds is not None,
        HAS_MASK=row_mask is not None,
        WRITE_VALUES=out_values is not None,
        ONLY_TILE=tiles == 1,
        **config.blocks,
        num_warps=config.num_warps,
        num_stages=config.num_stages,
    )
    if tiles > 1:
        grid = (triton.cdiv(number, COMBINE.blocks["BLOCK_P"]),)
        combine_kernel[grid](*partial, *sums, tiles, number, **COMBINE.blocks, num_warps=COMBINE.num_warps)
    return out_values


# The chunk of tiles is fixed: it is the order of the sum.
COMBINE = Config({"BLOCK_P": 32, "CHUNK": 16}, num_warps=4)


def row_bucket(rows: int) -> int:
    return 16 if rows <= 16 else 64 if rows <= 512 else 128


def bucket(rows: int, number: int, d: int, dtype: torch.dtype) -> str:
    return f"{str(dtype).removeprefix('torch.')}/d{d}/p{triton.next_power_of_2(number)}/t{row_bucket(rows)}"


def default(rows: int, dtype: torch.dtype) -> Config:
    if dtype == torch.float32:
        # The product runs on the scalar units: operands live in registers.
        return Config({"BLOCK_T": 16 if rows <= 16 else 32, "BLOCK_P": 32, "BLOCK_D": 32}, num_warps=4, num_stages=3)
    if rows <= 16:
        return Config({"BLOCK_T": 16, "BLOCK_P": 16, "BLOCK_D": 256}, num_warps=4, num_stages=4)
    if rows <= 512:
        # 1,024 probes over 256 rows: 128 instances, about one for each multiprocessor.
        return Config({"BLOCK_T": 64, "BLOCK_P": 32, "BLOCK_D": 128}, num_warps=4, num_stages=4)
    return Config({"BLOCK_T": 128, "BLOCK_P": 64, "BLOCK_D": 64}, num_warps=8, num_stages=4)
