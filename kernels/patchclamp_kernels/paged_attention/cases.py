"""These are the variants of `paged_attention` in use, for ahead-of-time compilation and for the tuner."""

from typing import Any

import torch

from patchclamp_kernels.cases import CompileCase, TuningCase
from patchclamp_kernels.configs import Config
from patchclamp_kernels.paged_attention.batch import Attended, RaggedBatch
from patchclamp_kernels.paged_attention.decode import combine_kernel, decode_kernel
from patchclamp_kernels.paged_attention.op import (
    COMBINE,
    DECODE,
    PREFILL,
    decode_default,
    paged_attention,
    prefill_default,
)
from patchclamp_kernels.paged_attention.prefill import prefill_kernel

# Query heads for 8 KV heads of 128: Llama-3-8B and Qwen3-1.7B.
MODELS = {"llama-3-8b": 32, "qwen3-1.7b": 16}
N_KV, DIM, BLOCK_SIZE = 8, 128, 16

_TYPES = {
    **dict.fromkeys(("q", "key_cache", "value_cache", "z"), "*bf16"),
    **dict.fromkeys(("block_tables", "context_lengths", "query_starts", "tiles", "marked", "argmax"), "*i32"),
    **dict.fromkeys(("head_scale", "probability", "marked_mass", "off_sink", "partials"), "*fp32"),
    **dict.fromkeys(("table_width", "n_splits", "tile_rows", "window", "sink", "recent"), "i32"),
    **dict.fromkeys(("scale", "ceiling"), "fp32"),
    "streaming_heads": "*u8",
}
_OPTIONAL = ("head_scale", "streaming_heads", "marked", "argmax", "probability", "marked_mass", "off_sink")
_READOUT = ("argmax", "probability")
_WATCHED = (*_READOUT, "off_sink")


def compile_cases() -> list[CompileCase]:
    cases = []
    for model, n_heads in MODELS.items():
        shape: dict[str, Any] = {"N_HEADS": n_heads, "DIM": DIM, "DIM_PAD": DIM}
        form = shape | {"N_KV": N_KV, "BLOCK_SIZE": BLOCK_SIZE, "HAS_CAP": False, "HAS_WINDOW": False}
        for suffix, given in (("", ()), ("-readout", _READOUT), ("-watched", _WATCHED)):
            for way, programs in (("direct", 2048), ("split", 8)):
                config = decode_default(DIM, 2, programs)
                blocks = {name: size for name, size in config.blocks.items() if name != "SPLITS"}
                direct = way == "direct"
                cases.append(
                    _case(
                        f"{model}-decode-{way}{suffix}",
                        decode_kernel,
                        form | {"GROUP_PAD": 16, "DIRECT": direct} | ({"partials": None} if direct else {}),
                        Config(blocks, config.num_warps, config.num_stages),
                        given,
                    )
                )
            cases.append(_case(f"{model}-combine{suffix}", combine_kernel, shape, COMBINE, given))
            cases.append(_case(f"{model}-prefill{suffix}", prefill_kernel, form, prefill_default(DIM, 2), given))
    return cases


def _case(name: str, kernel: Any, constexprs: dict[str, Any], config: Config, given: tuple[str, ...]) -> CompileCase:
    names = kernel.arg_names
    constexprs = constexprs | {n: None for n in _OPTIONAL if n in names and n not in given}
    signature = {n: _TYPES[n] for n in names if n in _TYPES and n not in constexprs}
    return CompileCase(name=name, kernel=kernel, signature=signature, constexprs=constexprs, config=config)


def tuning_cases(device: torch.device) -> list[TuningCase]:
    """Tunes decoding of Llama-3-8B at batches of 1 to 256, and a prompt of 4,096 tokens."""
    n_heads = MODELS["llama-3-8b"]
    cases = []
    shorter = [(tile, warps, stages) for tile in (32, 64, 128) for warps in (2, 4, 8) for stages in (2, 3, 4)]
    for sequences, context in ((1, 8192), (8, 8192), (64, 2048), (256, 1024)):
        programs = sequences * N_KV
        candidates = tuple(
            Config({"TILE": tile, "SPLIT": split, "SPLITS": limit}, warps, stages)
            for tile, warps, stages in shorter
            for split, limit in ((128, 128), (256, 128), (512, 16), (1024, 8))
            if programs <= 64 or split >= 512
        )
        bucket = f"d{DIM}-16-g{n_heads // N_KV}-p{programs}"
        cases.append(_tuning_case(DECODE, bucket, [(1, context - 1)] * sequences, candidates, n_heads, device))
    candidates = tuple(
        Config({"ROWS": rows, "TILE": tile}, warps, stages)
        for rows in (64, 128)
        for tile in (32, 64, 128)
        for warps in (4, 8)
        for stages in (2, 3, 4)
    )
    cases.append(_tuning_case(PREFILL, f"d{DIM}-16", [(4096, 0)], candidates, n_heads, device))
    return cases


def _tuning_case(
    op: str,
    bucket: str,
    rows: list[tuple[int, int]],
    candidates: tuple[Config, ...],
    n_heads: int,
    device: torch.device,
) -> TuningCase:
    needed = [-(-(n + offset) // BLOCK_SIZE) for n, offset in rows]
    # Blocks of a server that has run for a while lie anywhere.
    ids = torch.randperm(sum(needed), generator=torch.Generator().manual_seed(0)).tolist()
    spans = []
    for (n, offset), blocks in zip(rows, needed, strict=True):
        spans.append((n, offset, ids[:blocks]))
        ids = ids[blocks:]
    batch = RaggedBatch.build(spans, BLOCK_SIZE, device)
    cache = torch.randn(2, sum(needed), BLOCK_SIZE, N_KV, DIM, dtype=torch.bfloat16, device=device)
    q = torch.randn(sum(n for n, _ in rows), n_heads, DIM, dtype=torch.bfloat16, device=device)

    def run(config: Config) -> Attended:
        decode, prefill = (config, None) if op == DECODE else (None, config)
        return paged_attention(q, cache[0], cache[1], batch, scale=DIM**-0.5, config=decode, prefill_config=prefill)

    return TuningCase(op, bucket, candidates, run)
