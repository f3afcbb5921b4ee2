"""This is the checked wrapper, and what it launches by default."""

import torch
import triton
from torch import Tensor

from patchclamp_kernels.configs import Config, config_for
from patchclamp_kernels.logit_lens_topk.kernel import merge_kernel, norm_kernel, tile_kernel
from patchclamp_kernels.logit_lens_topk.reference import LensTopK, logit_lens_topk_reference
from patchclamp_kernels.runtime import check, check_tensor, uses_kernel

OP = "logit_lens_topk"
ACTIVATIONS = (torch.float32, torch.float16, torch.bfloat16)
MAX_K = 64


def logit_lens_topk(
    x: Tensor,
    unembedding: Tensor,
    *,
    k: int,
    norm_weight: Tensor | None = None,
    norm_bias: Tensor | None = None,
    eps: float = 1e-6,
    soft_cap: float = 0.0,
    out_values: Tensor | None = None,
    out_ids: Tensor | None = None,
    out_log_total: Tensor | None = None,
    config: Config | None = None,
) -> LensTopK:
    """k is 1 to 64, at most V; norm_weight and norm_bias [d] have the dtype of x or float32. Raises ValueError."""
    check(x.ndim == 2, f"x has shape {list(x.shape)}, not [*, *]")
    rows, d = x.shape
    device = x.device
    check_tensor("x", x, shape=(rows, d), dtypes=ACTIVATIONS, device=device)
    check_tensor("unembedding", unembedding, shape=(None, d), dtypes=(x.dtype,), device=device)
    vocabulary = unembedding.shape[0]
    check(vocabulary < 2**31 - 2**16, f"unembedding has {vocabulary} rows, not below 2^31 - 2^16")
    check(1 <= k <= min(MAX_K, vocabulary), f"k is {k}, not 1 to {min(MAX_K, vocabulary)}")
    check(soft_cap >= 0.0, f"soft_cap is {soft_cap}, not at least 0")
    check(norm_bias is None or norm_weight is not None, "norm_bias comes without norm_weight")
    for name, tensor in (("norm_weight", norm_weight), ("norm_bias", norm_bias)):
        if tensor is not None:
            check_tensor(name, tensor, shape=(d,), dtypes=(x.dtype, torch.float32), device=device)

    def output(name: str, given: Tensor | None, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        if given is None:
            return torch.empty(shape, dtype=dtype, device=device)
        check_tensor(name, given, shape=shape, dtypes=(dtype,), device=device)
        return given

    values = output("out_values", out_values, (rows, k), torch.float32)
    ids = output("out_ids", out_ids, (rows, k), torch.int64)
    log_total = output("out_log_total", out_log_total, (rows,), torch.float32)
    result = LensTopK(values, ids, log_total)
    if rows == 0:
        return result
    if not uses_kernel(x):
        lens = logit_lens_topk_reference(
            x, unembedding, k=k, norm_weight=norm_weight, norm_bias=norm_bias, eps=eps, soft_cap=soft_cap
        )
        values.copy_(lens.values)
        ids.copy_(lens.ids)
        log_total.copy_(lens.log_total)
        return result

    if config is None:
        config = config_for(OP, bucket(rows, vocabulary, d, x.dtype), default(rows, x.dtype), device)
    h = x if norm_weight is None else _normalised(x, norm_weight, norm_bias, eps)
    tiles = triton.cdiv(vocabulary, config.blocks["BLOCK_V"])
    peaks = torch.empty((rows, tiles), dtype=torch.float32, device=device)
    sums = torch.empty((rows, tiles), dtype=torch.float32, device=device)
    candidates = torch.empty((rows, tiles, k), dtype=torch.float32, device=device)
    candidate_ids = torch.empty((rows, tiles, k), dtype=torch.int32, device=device)
    tile_kernel[(triton.cdiv(rows, config.blocks["BLOCK_T"]), tiles)](
        h,
        unembedding,
        peaks,
        sums,
        candidates,
        candidate_ids,
        rows,
        vocabulary,
        k,
        float(soft_cap),
        D=d,
        HAS_CAP=soft_cap > 0.0,
        **config.blocks,
        num_warps=config.num_warps,
        num_stages=config.num_stages,
    )
    merge_kernel[(rows,)](
        peaks,
        sums,
        candidates,
        candidate_ids,
        values,
        ids,
        log_total,
        tiles,
        k,
        TILES=triton.next_power_of_2(tiles),
        num_warps=4,
    )
    return result


def _normalised(x: Tensor, weight: Tensor, bias: Tensor | None, eps: float) -> Tensor:
    rows, d = x.shape
    h = torch.empty((rows, d), dtype=x.dtype, device=x.device)
    norm_kernel[(rows,)](
        x,
        weight,
        weight if bias is None else bias,
        h,
        d,
        float(eps),
        HAS_BIAS=bias is not None,
        BLOCK_D=triton.next_power_of_2(d),
        num_warps=norm_warps(d),
    )
    return h


def norm_warps(d: int) -> int:
    return 4 if d <= 4096 else 8 if d <= 16384 else 16


def row_bucket(rows: int) -> int:
    return 16 if rows <= 16 else 64 if rows <= 64 else 128


def bucket(rows: int, vocabulary: int, d: int, dtype: torch.dtype) -> str:
    return f"{str(dtype).removeprefix('torch.')}/d{d}/v{vocabulary}/t{row_bucket(rows)}"


def default(rows: int, dtype: torch.dtype) -> Config:
    if dtype == torch.float32:
        # The product runs on the scalar units: operands live in registers.
        return Config({"BLOCK_T": 16 if rows <= 16 else 32, "BLOCK_V": 64, "BLOCK_D": 32}, num_warps=4, num_stages=3)
    if rows <= 16:
        # Bound by reading the unembedding: several instances on a multiprocessor, one streams while another selects.
        return Config({"BLOCK_T": 16, "BLOCK_V": 128, "BLOCK_D": 64}, num_warps=4, num_stages=4)
    if rows <= 64:
        return Config({"BLOCK_T": 64, "BLOCK_V": 128, "BLOCK_D": 64}, num_warps=4, num_stages=4)
    return Config({"BLOCK_T": 128, "BLOCK_V": 128, "BLOCK_D": 64}, num_warps=8, num_stages=3)
