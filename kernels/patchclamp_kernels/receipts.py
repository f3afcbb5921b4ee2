"""This op adds the receipts of a step to the counters of its programs.

    counts[counters[s, i]] += Σ_t receipts[t, i]      t over the rows of span s

receipts [T, items, 2] float32 are places edited, and the sum of |Δ|₂ / |h|₂; spans [S, 2] int32 are the first row and
the rows of one sequence (0 rows pads); counters [S, items] int32 is a row of counts, or -1; counts is [rows, 2]
float64.

Sums are float64 and of a fixed order: a tile of rows by a tree, tile after tile. There are no atomics, so no counter
may be named twice among the spans that have rows. One program instance takes a tile of the items of one span; the bound
is the 8 bytes of each (row, item), read once with whole lines of neighbouring items.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from patchclamp_kernels.cases import CompileCase, TuningCase
from patchclamp_kernels.configs import Config, config_for
from patchclamp_kernels.runtime import check_tensor, uses_kernel

DEFAULT = Config({"ROWS": 64, "COLUMNS": 16}, num_warps=4, num_stages=1)


def accumulate_receipts_reference(counts: Tensor, receipts: Tensor, spans: Tensor, counters: Tensor) -> None:
    for (first, n), items in zip(spans.tolist(), counters.tolist(), strict=True):
        for item, counter in enumerate(items):
            if counter >= 0 and n > 0:
                counts[counter] += receipts[first : first + n, item].double().sum(0)


@triton.jit(do_not_specialize=["items"])
def accumulate_receipts_kernel(counts, receipts, spans, counters, items, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    span = tl.program_id(0).to(tl.int64)
    # Columns are numbers of receipts[t]: two an item.
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    inside = column < items * 2
    first = tl.load(spans + span * 2).to(tl.int64)
    n = tl.load(spans + span * 2 + 1)
    counter = tl.load(counters + span * items + column // 2, mask=inside, other=-1)
    wanted = (counter >= 0) & (n > 0)
    row = tl.arange(0, ROWS)
    total = tl.zeros([COLUMNS], dtype=tl.float64)
    done = 0
    while done < n:
        at = (first + done + row)[:, None] * (items * 2) + column[None, :]
        part = tl.load(receipts + at, mask=(done + row < n)[:, None] & wanted[None, :], other=0.0)
        total += tl.sum(part.to(tl.float64), axis=0)
        done += ROWS
    place = counts + counter.to(tl.int64) * 2 + column % 2
    tl.store(place, tl.load(place, mask=wanted, other=0.0) + total, mask=wanted)


def accumulate_receipts(
    counts: Tensor, receipts: Tensor, spans: Tensor, counters: Tensor, *, config: Config | None = None
) -> None:
    """Adds to `counts` in place, and zeroes nothing. Raises ValueError naming an argument that does not fit."""
    device = counts.device
    check_tensor("counts", counts, shape=(None, 2), dtypes=(torch.float64,), device=device)
    check_tensor("receipts", receipts, shape=(None, None, 2), dtypes=(torch.float32,), device=device)
    check_tensor("spans", spans, shape=(None, 2), dtypes=(torch.int32,), device=device)
    n_spans, items = len(spans), receipts.shape[1]
    check_tensor("counters", counters, shape=(n_spans, items), dtypes=(torch.int32,), device=device)
    if n_spans == 0 or items == 0:
        return
    if not uses_kernel(counts):
        accumulate_receipts_reference(counts, receipts, spans, counters)
        return
    if config is None:
        config = config_for("receipts", "any", DEFAULT, device)
    grid = (n_spans, triton.cdiv(items * 2, config.blocks["COLUMNS"]))
    accumulate_receipts_kernel[grid](
        counts,
        receipts,
        spans,
        counters,
        items,
        **config.blocks,
        num_warps=config.num_warps,
        num_stages=config.num_stages,
    )


def compile_cases() -> list[CompileCase]:
    types = {"counts": "*fp64", "receipts": "*fp32", "spans": "*i32", "counters": "*i32", "items": "i32"}
    # Items are not a multiple of anything, so neighbouring numbers are loaded one at a time by neighbouring threads.
    return [CompileCase("receipts", accumulate_receipts_kernel, types, {}, DEFAULT, vector_bytes=4)]


def tuning_cases(device: torch.device) -> list[TuningCase]:
    return []
