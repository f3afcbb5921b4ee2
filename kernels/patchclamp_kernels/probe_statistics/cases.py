"""These are the variants in use, and what may be tuned."""

from itertools import product

import torch

from patchclamp_kernels.cases import CompileCase, TuningCase
from patchclamp_kernels.configs import Config
from patchclamp_kernels.probe_statistics.kernel import combine_kernel, tile_kernel
from patchclamp_kernels.probe_statistics.op import COMBINE, OP, bucket, default, probe_statistics, row_bucket

# Width of the residual stream of the models whose shapes are compiled and tuned.
WIDTHS = {"llama-3-8b": 4096, "qwen3-1.7b": 2048}


def compile_cases() -> list[CompileCase]:
    pointers = {
        "x": "*bf16",
        "probes": "*bf16",
        "offsets": "*fp32",
        "low": "*fp32",
        "high": "*fp32",
        "thresholds": "*fp32",
        "row_mask": "*i32",
        "values": "*fp32",
        "histogram": "*i64",
        "count": "*i64",
        "not_finite": "*i64",
        "fired": "*i64",
        "total": "*fp64",
        "total_squares": "*fp64",
        "largest": "*fp32",
    }
    signature = {**pointers, "rows": "i32", "number": "i32", "bins": "i32"}
    flags = dict.fromkeys(("HAS_OFFSETS", "HAS_THRESHOLDS", "HAS_MASK"), True)
    cases = []
    for (model, d), rows, values in product(WIDTHS.items(), (8, 256, 2048), (False, True)):
        config = default(rows, torch.bfloat16)
        shape = {"D": d, "WRITE_VALUES": values, "ONLY_TILE": rows <= config.blocks["BLOCK_T"]}
        cases.append(
            CompileCase(
                name=f"{model}-{rows}-rows{'-values' if values else ''}",
                kernel=tile_kernel,
                signature=signature,
                constexprs={**flags, **shape, **config.blocks},
                config=config,
                divisible=("number",),
            )
        )
    sums = {"total": "*fp64", "total_squares": "*fp64", "largest": "*fp32"}
    partial = {"tile_totals": "*fp64", "tile_squares": "*fp64", "tile_largest": "*fp32"}
    cases.append(
        CompileCase(
            name="combine",
            kernel=combine_kernel,
            signature={**partial, **sums, "tiles": "i32", "number": "i32"},
            constexprs=COMBINE.blocks,
            config=COMBINE,
            divisible=("number",),
        )
    )
    return cases


def tuning_cases(device: torch.device) -> list[TuningCase]:
    candidates = {
        16: [(16, 16, 256, 4, 4), (16, 16, 128, 4, 5), (16, 32, 128, 4, 4), (16, 16, 512, 4, 3)],
        64: [(64, 32, 128, 4, 4), (64, 32, 64, 4, 5), (64, 64, 128, 4, 3), (64, 64, 64, 8, 4), (128, 32, 64, 4, 4)],
        128: [(128, 64, 64, 8, 4), (128, 128, 64, 8, 4), (128, 64, 64, 4, 4), (64, 64, 64, 4, 4)],
    }
    cases = []
    for d in WIDTHS.values():
        for rows in (8, 256, 2048):
            options = tuple(
                Config({"BLOCK_T": t, "BLOCK_P": p, "BLOCK_D": k}, num_warps=warps, num_stages=stages)
                for t, p, k, warps, stages in candidates[row_bucket(rows)]
            )
            cases.append(_tuning_case(rows, 1024, d, options, device))
    return cases


def _tuning_case(rows: int, number: int, d: int, options: tuple[Config, ...], device: torch.device) -> TuningCase:
    x = torch.randn(rows, d, device=device, dtype=torch.bfloat16)
    probes = torch.randn(number, d, device=device, dtype=torch.bfloat16) / d**0.5
    numbers = torch.zeros(5, number, device=device)
    sums = torch.zeros(2, number, device=device, dtype=torch.float64)
    counts = torch.zeros(3, number, device=device, dtype=torch.int64)
    histogram = torch.zeros(number, 66, device=device, dtype=torch.int64)

    def run(config: Config) -> object:
        return probe_statistics(
            x,
            probes,
            low=numbers[0] - 4,
            high=numbers[1] + 4,
            offsets=numbers[2],
            thresholds=numbers[3],
            largest=numbers[4],
            histogram=histogram,
            count=counts[0],
            not_finite=counts[1],
            fired=counts[2],
            total=sums[0],
            total_squares=sums[1],
            config=config,
        )

    return TuningCase(OP, bucket(rows, number, d, x.dtype), options, run)
