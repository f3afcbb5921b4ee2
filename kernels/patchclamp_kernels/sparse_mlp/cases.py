"""These are the variants in use for Llama-3-8B and Qwen3-1.7B in bfloat16 and in four bits, and what may be tuned."""

from collections.abc import Iterator
from itertools import product
from typing import Any

import torch
import triton
from torch import Tensor

from patchclamp_kernels.cases import CompileCase, TuningCase
from patchclamp_kernels.configs import Config
from patchclamp_kernels.sparse_mlp.index_sets import (
    default_up_config,
    sparse_down,
    sparse_up,
    up_row_kernel,
    up_tile_kernel,
)
from patchclamp_kernels.sparse_mlp.int4 import Int4Weight, Weight
from patchclamp_kernels.sparse_mlp.rows import (
    REDUCE,
    bucket_of,
    default_config,
    ordered_sum_kernel,
    split_slots,
    weighted_row_kernel,
    weighted_tile_kernel,
)
from patchclamp_kernels.sparse_mlp.sets import NeuronSets
from patchclamp_kernels.sparse_mlp.threshold import sparse_linear

MODELS = {"llama": (4096, 14336), "qwen": (2048, 6144)}  # d, d_ff
ROWS = (1, 16, 32)  # the row kernel and both tiles
GROUPS = (0, 32, 128)  # dense, and the extremes of four bits


def compile_cases() -> list[CompileCase]:
    return [*_up_cases(), *_weighted_cases(), *_sum_cases()]


def _up_cases() -> Iterator[CompileCase]:
    for rows, group in product(ROWS, GROUPS):
        config = default_up_config(rows, _weight_like(group))
        constexprs: dict[str, Any] = {"ACTIVATION": "silu", "GATED": True, "bias": None}
        yield _case("up", up_row_kernel, up_tile_kernel, rows, group, config, constexprs)


def _weighted_cases() -> Iterator[CompileCase]:
    for rows, group in product(ROWS, GROUPS):
        config = default_config(rows, _weight_like(group))
        by_set = {"thresholds": None, "channel_scale": None}
        yield _case("down", weighted_row_kernel, weighted_tile_kernel, rows, group, config, by_set)
        for name, scale in (("teal", {"channel_scale": None}), ("wina", {})):
            by_threshold = {"index": None, "which": None, **scale}
            yield _case(name, weighted_row_kernel, weighted_tile_kernel, rows, group, config, by_threshold)


def _sum_cases() -> Iterator[CompileCase]:
    splits = {
        triton.next_power_of_2(split_slots(d_ff // 2, d, default_config(rows, _weight_like(group)))[0])
        for rows, group, (d, d_ff) in product(ROWS, GROUPS, MODELS.values())
    }
    for count in sorted(splits):
        constexprs = {"BLOCK_S": count, "bias": None}
        yield _described(f"ordered_sum splits={count}", ordered_sum_kernel, constexprs, REDUCE)


def _case(
    name: str, row: Any, tile: Any, rows: int, group: int, config: Config, constexprs: dict[str, Any]
) -> CompileCase:
    """Returns one case for both models, because no size of theirs is compiled in."""
    constexprs = {**constexprs, "GROUP": group}
    if not group:
        constexprs |= {"scales": None, "zeros": None}
    if rows > 1:
        constexprs["BLOCK_B"] = rows
    form = "row" if rows == 1 else f"tile{rows}"
    weight = f"int4/{group}" if group else "bf16"
    return _described(f"{name} {weight} {form}", row if rows == 1 else tile, constexprs, config, group > 0)


def _described(
    name: str, kernel: Any, constexprs: dict[str, Any], config: Config, quantised: bool = False
) -> CompileCase:
    types = {
        "weight": "*i32" if quantised else "*bf16",
        "threshold": "fp32",
        **dict.fromkeys(("index", "which"), "*i32"),
        **dict.fromkeys(("thresholds", "channel_scale", "partial"), "*fp32"),
        **dict.fromkeys(("a", "x", "h", "out", "scales", "zeros", "bias"), "*bf16"),
    }
    counts = ("rows", "sets", "splits")
    signature = {
        argument: types.get(argument, "i32")
        for argument in kernel.arg_names
        if argument not in constexprs and argument not in config.blocks
    }
    divisible = tuple(argument for argument, kind in signature.items() if kind == "i32" and argument not in counts)
    return CompileCase(name, kernel, signature, constexprs, config, divisible)


def _weight_like(group: int) -> Weight:
    if not group:
        return torch.empty(1, 128, dtype=torch.bfloat16)
    return Int4Weight(torch.empty(1, 64, dtype=torch.uint8), torch.empty(1, 128 // group), None, group)


def tuning_cases(device: torch.device) -> list[TuningCase]:
    """Tunes half of the neurons, and half of the input channels; batch 1 and one set for 16 rows."""
    return [
        case
        for (d, d_ff), rows, quantised in product(MODELS.values(), (1, 16), (False, True))
        for case in _tuning_cases(device, d, d_ff, rows, quantised)
    ]


def _tuning_cases(device: torch.device, d: int, d_ff: int, rows: int, quantised: bool) -> Iterator[TuningCase]:
    x, h = (torch.randn(rows, n, device=device, dtype=torch.bfloat16) for n in (d, d_ff // 2))
    index = torch.randperm(d_ff, device=device)[: d_ff // 2].sort().values.int()[None]
    sets = NeuronSets(index, torch.zeros(rows, dtype=torch.int32, device=device))
    gate_up, down = _random_weight(2 * d_ff, d, device, quantised), _random_weight(d_ff, d, device, quantised)
    qkv = _random_weight(d, 3 * d // 2, device, quantised)

    def up(config: Config) -> Tensor:
        return sparse_up(x, gate_up, sets, config=config)

    def project(config: Config) -> Tensor:
        return sparse_down(h, down, sets, config=config)

    def skip(config: Config) -> Tensor:
        return sparse_linear(x, qkv, threshold=0.6745, config=config)

    yield TuningCase("sparse_up", bucket_of(rows, d_ff // 2, d, gate_up), _up_candidates(rows, quantised), up)
    candidates = _weighted_candidates(rows, quantised)
    yield TuningCase("sparse_down", bucket_of(rows, d_ff // 2, d, down), candidates, project)
    yield TuningCase("sparse_linear", bucket_of(rows, d, 3 * d // 2, qkv), candidates, skip)


def _random_weight(rows: int, columns: int, device: torch.device, quantised: bool) -> Weight:
    if not quantised:
        return torch.randn(rows, columns, device=device, dtype=torch.bfloat16).div_(columns**0.5)
    packed = torch.randint(0, 256, (rows, columns // 2), device=device, dtype=torch.uint8)
    scales = torch.full((rows, columns // 64), 0.01, device=device, dtype=torch.bfloat16)
    return Int4Weight(packed, scales, torch.full_like(scales, 8), 64)


def _up_candidates(rows: int, quantised: bool) -> tuple[Config, ...]:
    if rows == 1:
        widths = (512, 1024, 2048) if quantised else (256, 512, 1024)
        return tuple(
            Config({"BLOCK_J": neurons, "BLOCK_D": width, "STAGES": stages}, num_warps=warps)
            for neurons, width, stages, warps in product((2, 4, 8), widths, (1, 3), (2, 4, 8))
        )
    return tuple(
        Config({"BLOCK_J": neurons, "BLOCK_D": width}, num_warps=warps, num_stages=stages)
        for neurons, width, warps, stages in product((16, 32, 64), _tile_widths(quantised), (2, 4), (3, 4, 5))
    )


def _weighted_candidates(rows: int, quantised: bool) -> tuple[Config, ...]:
    widths = (256, 512, 1024) if quantised else (128, 256, 512)
    if rows == 1:
        return tuple(
            Config({"BLOCK_J": slots, "BLOCK_C": width, "PROGRAMS": programs, "STAGES": stages}, num_warps=warps)
            for slots, width, programs, stages, warps in product((8, 16, 32), widths, (512, 768, 1024), (1, 3), (4, 8))
        )
    return tuple(
        Config({"BLOCK_J": slots, "BLOCK_C": width, "PROGRAMS": programs}, num_warps=4, num_stages=stages)
        for slots, width, programs, stages in product((16, 32, 64), _tile_widths(quantised), (128, 256, 512), (4, 7))
    )


def _tile_widths(quantised: bool) -> tuple[int, ...]:
    """Returns whole groups, of any size that is allowed."""
    return (128, 256) if quantised else (64, 128, 256)
