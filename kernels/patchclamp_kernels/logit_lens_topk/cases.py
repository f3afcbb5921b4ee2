"""These are the variants in use, and what may be tuned."""

from itertools import product

import torch
import triton
from torch import Tensor

from patchclamp_kernels.cases import CompileCase, TuningCase
from patchclamp_kernels.configs import Config
from patchclamp_kernels.logit_lens_topk.kernel import merge_kernel, norm_kernel, tile_kernel
from patchclamp_kernels.logit_lens_topk.op import OP, bucket, default, logit_lens_topk, norm_warps, row_bucket

# Vocabulary and width of the models whose shapes are compiled and tuned.
MODELS = {"llama-3-8b": (128256, 4096), "qwen3-1.7b": (151936, 2048)}


def compile_cases() -> list[CompileCase]:
    scratch = {"tile_max": "*fp32", "tile_sum": "*fp32", "candidate_values": "*fp32", "candidate_ids": "*i32"}
    cases = []
    for (model, (_, d)), rows in product(MODELS.items(), (8, 64, 256)):
        config = default(rows, torch.bfloat16)
        cases.append(
            CompileCase(
                name=f"{model}-{rows}-rows",
                kernel=tile_kernel,
                signature={
                    "h": "*bf16",
                    "unembedding": "*bf16",
                    **scratch,
                    "rows": "i32",
                    "vocabulary": "i32",
                    "k": "i32",
                    "soft_cap": "fp32",
                },
                constexprs={"D": d, "HAS_CAP": False, **config.blocks},
                config=config,
                divisible=("vocabulary",),
            )
        )
    for model, (vocabulary, d) in MODELS.items():
        cases.append(
            CompileCase(
                name=f"{model}-norm",
                kernel=norm_kernel,
                signature={"x": "*bf16", "weight": "*bf16", "bias": "*bf16", "out": "*bf16", "d": "i32", "eps": "fp32"},
                constexprs={"HAS_BIAS": False, "BLOCK_D": triton.next_power_of_2(d)},
                config=Config(num_warps=norm_warps(d)),
                divisible=("d",),
            )
        )
        cases.append(
            CompileCase(
                name=f"{model}-merge",
                kernel=merge_kernel,
                signature={
                    **scratch,
                    "values": "*fp32",
                    "ids": "*i64",
                    "log_totals": "*fp32",
                    "tiles": "i32",
                    "k": "i32",
                },
                constexprs={"TILES": triton.next_power_of_2(triton.cdiv(vocabulary, 128))},
                config=Config(num_warps=4),
                vector_bytes=0,
            )
        )
    return cases


def tuning_cases(device: torch.device) -> list[TuningCase]:
    candidates = {
        16: [(16, 128, 64, 4, 4), (16, 128, 128, 4, 4), (16, 64, 128, 4, 4), (16, 256, 64, 8, 4), (16, 64, 256, 4, 3)],
        64: [(64, 128, 64, 4, 4), (64, 128, 128, 4, 3), (64, 64, 64, 4, 5), (64, 256, 64, 8, 4)],
        128: [(128, 128, 64, 8, 3), (128, 128, 64, 8, 4), (128, 128, 64, 4, 4), (64, 128, 64, 4, 4)],
    }
    cases = []
    for vocabulary, d in MODELS.values():
        unembedding = torch.randn(vocabulary, d, device=device, dtype=torch.bfloat16)
        for rows in (8, 64, 256):
            x = torch.randn(rows, d, device=device, dtype=torch.bfloat16)
            options = tuple(
                Config({"BLOCK_T": t, "BLOCK_V": v, "BLOCK_D": step}, num_warps=warps, num_stages=stages)
                for t, v, step, warps, stages in candidates[row_bucket(rows)]
            )

            def run(config: Config, x: Tensor = x, unembedding: Tensor = unembedding) -> object:
                return logit_lens_topk(x, unembedding, k=10, config=config)

            cases.append(TuningCase(OP, bucket(rows, vocabulary, d, x.dtype), options, run))
    return cases
