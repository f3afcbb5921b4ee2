"""These ops find the most likely token of each row of logits, and log softmax at given tokens, without the softmax.

    greedy_choice:   id[b] = argmax l[b], the lowest id among equals;  logprob[b] = l[b, id] - log Σ exp l[b]
    token_logprobs:  out[b, j] = l[b, ids[b, j]] - log Σ exp l[b]

l [B, V] is float32, float16 or bfloat16; sums are in float32, logarithms natural. A row that holds NaN or +inf, or only
-inf, has no distribution: its id is NOT_FINITE and its log-probabilities are NaN, as in the engine's sampler.

Both read the logits once (B·V elements, the bound) in tiles of a row, so that one row of 128,256 still fills a GPU:
each instance leaves the maximum of its tile, where it stands, and the sum of exponentials below it. A second pass, with
an instance for each row, combines the tiles in the order of ids. The sum carries the broken rows: the exponential of
NaN, and of inf - inf, is NaN and stays so in every sum, whereas a maximum may drop it.

The server does not call it yet: its sampler on CUDA runs torch operators until a GPU is at hand to compare both.
"""

from itertools import product

import torch
import triton
import triton.language as tl
from torch import Tensor

from patchclamp_kernels.cases import CompileCase, TuningCase
from patchclamp_kernels.configs import Config, config_for
from patchclamp_kernels.runtime import accumulation_dtype, check, check_tensor, uses_kernel

OP = "token_choice"
LOGITS = (torch.float32, torch.float16, torch.bfloat16)
# The id of a row without a distribution.
NOT_FINITE = -1


def greedy_choice_reference(logits: Tensor) -> tuple[Tensor, Tensor]:
    """Returns ids int64 [B] and log-probabilities [B] in the accumulation dtype."""
    numbers = logits.to(accumulation_dtype(logits.dtype))
    if numbers.numel() == 0:
        return torch.empty(len(numbers), dtype=torch.int64, device=logits.device), numbers.sum(-1)
    peak = numbers.amax(dim=-1, keepdim=True)
    best = (numbers == peak).int().argmax(dim=-1)
    finite = peak.squeeze(-1).isfinite()
    logprob = peak.squeeze(-1) - numbers.logsumexp(dim=-1)
    return torch.where(finite, best, NOT_FINITE), torch.where(finite, logprob, float("nan"))


def token_logprobs_reference(logits: Tensor, ids: Tensor) -> Tensor:
    """Returns [B, n] in the accumulation dtype."""
    numbers = logits.to(accumulation_dtype(logits.dtype))
    known = (ids >= 0) & (ids < logits.shape[-1])
    finite = numbers.amax(dim=-1, keepdim=True).isfinite()
    scores = numbers.gather(-1, torch.where(known, ids, 0)) - numbers.logsumexp(dim=-1, keepdim=True)
    return torch.where(known & finite, scores, float("nan"))


@triton.jit
def _tile_kernel(
    logits,
    tile_max,  # float32 [B, tiles]
    tile_sum,  # float32 [B, tiles]
    tile_id,  # int32 [B, tiles]
    vocabulary,
    WITH_ID: tl.constexpr,
    BLOCK_V: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    tile = tl.program_id(1)
    token = tile * BLOCK_V + tl.arange(0, BLOCK_V)
    values = tl.load(logits + row * vocabulary + token, mask=token < vocabulary, other=-float("inf")).to(tl.float32)
    peak = tl.max(values, axis=0)
    # A tile of nothing but -inf has the sum 0, not NaN.
    shift = tl.where(peak == -float("inf"), 0.0, peak)
    place = row * tl.num_programs(1) + tile
    tl.store(tile_max + place, peak)
    tl.store(tile_sum + place, tl.sum(tl.exp(values - shift), axis=0))
    if WITH_ID:
        tl.store(tile_id + place, tl.min(tl.where(values == peak, token, 2147483647), axis=0))


@triton.jit
def _merge_sums(tile_max, tile_sum, row, tiles, TILES: tl.constexpr):
    """Returns a row's maximum, and Σ exp(l - maximum), which is positive exactly where the row has a distribution."""
    tile = tl.arange(0, TILES)
    place = row * tiles + tile
    peaks = tl.load(tile_max + place, mask=tile < tiles, other=-float("inf"))
    sums = tl.load(tile_sum + place, mask=tile < tiles, other=0.0)
    peak = tl.max(peaks, axis=0)
    shift = tl.where(peak == -float("inf"), 0.0, peak)
    return peak, tl.sum(sums * tl.exp(peaks - shift), axis=0), peaks


@triton.jit
def _greedy_kernel(tile_max, tile_sum, tile_id, ids, logprobs, tiles, TILES: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    peak, total, peaks = _merge_sums(tile_max, tile_sum, row, tiles, TILES)
    tile = tl.arange(0, TILES)
    candidates = tl.load(tile_id + row * tiles + tile, mask=tile < tiles, other=2147483647)
    best = tl.min(tl.where(peaks == peak, candidates, 2147483647), axis=0)
    finite = total > 0.0
    tl.store(ids + row, tl.where(finite, best, -1).to(tl.int64))
    tl.store(logprobs + row, tl.where(finite, -tl.log(total), float("nan")))


@triton.jit(do_not_specialize=["n"])
def _logprobs_kernel(
    logits, tile_max, tile_sum, ids, logprobs, vocabulary, tiles, n, TILES: tl.constexpr, BLOCK_N: tl.constexpr
):
    row = tl.program_id(0).to(tl.int64)
    peak, total, _ = _merge_sums(tile_max, tile_sum, row, tiles, TILES)
    finite = total > 0.0
    log_total = tl.log(total)
    start = 0
    while start < n:
        j = start + tl.arange(0, BLOCK_N)
        token = tl.load(ids + row * n + j, mask=j < n, other=-1)
        known = (token >= 0) & (token < vocabulary)
        value = tl.load(logits + row * vocabulary + token, mask=known, other=0.0).to(tl.float32)
        # The difference first: it is exact to float32 however large the logits are.
        score = tl.where(known, (value - peak) - log_total, float("nan"))
        tl.store(logprobs + row * n + j, tl.where(finite, score, float("nan")), mask=j < n)
        start += BLOCK_N


def greedy_choice(
    logits: Tensor,
    *,
    out_ids: Tensor | None = None,
    out_logprobs: Tensor | None = None,
    config: Config | None = None,
) -> tuple[Tensor, Tensor]:
    """Returns ids int64 [B] and their log-probabilities float32 [B]. Raises ValueError."""
    rows, vocabulary = _check_logits(logits)
    if out_ids is None:
        out_ids = torch.empty(rows, dtype=torch.int64, device=logits.device)
    if out_logprobs is None:
        out_logprobs = torch.empty(rows, dtype=torch.float32, device=logits.device)
    check_tensor("out_ids", out_ids, shape=(rows,), dtypes=(torch.int64,), device=logits.device)
    check_tensor("out_logprobs", out_logprobs, shape=(rows,), dtypes=(torch.float32,), device=logits.device)
    if not uses_kernel(logits):
        ids, scores = greedy_choice_reference(logits)
        return out_ids.copy_(ids), out_logprobs.copy_(scores)
    if rows == 0:
        return out_ids, out_logprobs
    config = config or config_for(OP, _bucket(vocabulary, logits.dtype), DEFAULT, logits.device)
    tiles = triton.cdiv(vocabulary, config.blocks["BLOCK_V"])
    peaks, sums = _tile_scratch(logits, tiles)
    places = torch.empty((rows, tiles), dtype=torch.int32, device=logits.device)
    _launch_tiles(logits, peaks, sums, places, tiles, config)
    _greedy_kernel[(rows,)](peaks, sums, places, out_ids, out_logprobs, tiles, TILES=triton.next_power_of_2(tiles))
    return out_ids, out_logprobs


def token_logprobs(logits: Tensor, ids: Tensor, *, out: Tensor | None = None, config: Config | None = None) -> Tensor:
    """Returns log softmax float32 [B, n] at ids int64 [B, n]; NaN outside the vocabulary. Raises ValueError."""
    rows, vocabulary = _check_logits(logits)
    check_tensor("ids", ids, shape=(rows, None), dtypes=(torch.int64,), device=logits.device)
    n = ids.shape[1]
    if out is None:
        out = torch.empty((rows, n), dtype=torch.float32, device=logits.device)
    check_tensor("out", out, shape=(rows, n), dtypes=(torch.float32,), device=logits.device)
    if rows == 0 or n == 0:
        return out
    if not uses_kernel(logits):
        return out.copy_(token_logprobs_reference(logits, ids))
    config = config or config_for(OP, _bucket(vocabulary, logits.dtype), DEFAULT, logits.device)
    tiles = triton.cdiv(vocabulary, config.blocks["BLOCK_V"])
    peaks, sums = _tile_scratch(logits, tiles)
    _launch_tiles(logits, peaks, sums, None, tiles, config)
    _logprobs_kernel[(rows,)](
        logits,
        peaks,
        sums,
        ids,
        out,
        vocabulary,
        tiles,
        n,
        TILES=triton.next_power_of_2(tiles),
        BLOCK_N=128,
    )
    return out


def _check_logits(logits: Tensor) -> tuple[int, int]:
    check(logits.ndim == 2, f"logits has shape {list(logits.shape)}, not [*, *]")
    rows, vocabulary = logits.shape
    check_tensor("logits", logits, shape=(rows, vocabulary), dtypes=LOGITS, device=logits.device)
    check(0 < vocabulary < 2**31 - 2**16, f"logits has {vocabulary} columns, not 1 to 2^31 - 2^16")
    return rows, vocabulary


def _tile_scratch(logits: Tensor, tiles: int) -> tuple[Tensor, Tensor]:
    shape = (len(logits), tiles)
    peaks = torch.empty(shape, dtype=torch.float32, device=logits.device)
    return peaks, torch.empty(shape, dtype=torch.float32, device=logits.device)


def _launch_tiles(
    logits: Tensor, peaks: Tensor, sums: Tensor, places: Tensor | None, tiles: int, config: Config
) -> None:
    _tile_kernel[(len(logits), tiles)](
        logits,
        peaks,
        sums,
        peaks if places is None else places,
        logits.shape[1],
        WITH_ID=places is not None,
        **config.blocks,
        num_warps=config.num_warps,
        num_stages=config.num_stages,
    )


# Each thread has 32 values in flight, and a row of 128,256 makes 32 instances.
DEFAULT = Config({"BLOCK_V": 4096}, num_warps=4, num_stages=1)


def _bucket(vocabulary: int, dtype: torch.dtype) -> str:
    return f"{str(dtype).removeprefix('torch.')}/v{vocabulary}"


def compile_cases() -> list[CompileCase]:
    cases = []
    for dtype, with_id in product(("fp32", "bf16"), (True, False)):
        cases.append(
            CompileCase(
                name=f"tiles-{dtype}{'-ids' if with_id else ''}",
                kernel=_tile_kernel,
                signature={
                    "logits": f"*{dtype}",
                    "tile_max": "*fp32",
                    "tile_sum": "*fp32",
                    "tile_id": "*i32" if with_id else "*fp32",
                    "vocabulary": "i32",
                },
                constexprs={"WITH_ID": with_id, **DEFAULT.blocks},
                config=DEFAULT,
                divisible=("vocabulary",),
            )
        )
    tiles = {"tile_max": "*fp32", "tile_sum": "*fp32"}
    for vocabulary in (128256, 151936):
        number = triton.next_power_of_2(triton.cdiv(vocabulary, DEFAULT.blocks["BLOCK_V"]))
        cases.append(
            CompileCase(
                name=f"greedy-{vocabulary}",
                kernel=_greedy_kernel,
                signature={**tiles, "tile_id": "*i32", "ids": "*i64", "logprobs": "*fp32", "tiles": "i32"},
                constexprs={"TILES": number},
                config=Config(),
                vector_bytes=0,
            )
        )
        cases.append(
            CompileCase(
                name=f"logprobs-{vocabulary}",
                kernel=_logprobs_kernel,
                signature={
                    "logits": "*fp32",
                    **tiles,
                    "ids": "*i64",
                    "logprobs": "*fp32",
                    "vocabulary": "i32",
                    "tiles": "i32",
                    "n": "i32",
                },
                constexprs={"TILES": number, "BLOCK_N": 128},
                config=Config(),
                divisible=("vocabulary",),
                vector_bytes=0,
            )
        )
    return cases


def tuning_cases(device: torch.device) -> list[TuningCase]:
    cases = []
    for vocabulary in (128256, 151936):
        for dtype in (torch.float32, torch.bfloat16):
            logits = torch.randn(64, vocabulary, device=device, dtype=torch.float32).to(dtype)
            options = tuple(
                Config({"BLOCK_V": block}, num_warps=warps, num_stages=1)
                for block, warps in ((2048, 4), (4096, 4), (4096, 8), (8192, 8), (16384, 16))
            )

            def run(config: Config, logits: Tensor = logits) -> object:
                return greedy_choice(logits, config=config)

            cases.append(TuningCase(OP, _bucket(vocabulary, dtype), options, run))
    return cases
