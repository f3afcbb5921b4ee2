"""This op applies rotary embedding to q and k, and writes k and v into the paged cache, in one launch.

    y = round(x / sqrt(mean(x²) + eps) · w)          q and k, where the model has q and k norms
    y[:R] = y[:R] cos[p] + roll(y[:R], R/2) signed_sin[p]

qkv [T, (H + 2 KV) D] has rows of the fused product: H query heads, KV key heads, KV value heads. cos and signed_sin are
[context, R] with R ≤ D even; the sign of rotate_half is folded into the first half of the sine (RoFormer, Su et al.
2021, in the layout of Llama). Row t stands at position positions[t] and its k and v go to the token address slots[t] =
block · block_size + offset; a negative address writes no key and no value (a row that only pads the batch). It returns
q [T, H, D].

The normed value is rounded to the activation dtype before it is rotated, as a decoder of separate operators does; the
rotation itself is computed in float32 and rounded once. Nothing is reused, so the bound is bytes: a row reads and
writes (H + 2 KV) D elements. A program takes some heads of one row: a batch of 1 still gives several programs, and
every thread moves 16 bytes. The partner of an element in the rotation is a second load of the same line, which is in
the L1: cheaper than an exchange between threads.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from patchclamp_kernels.cases import CompileCase, TuningCase
from patchclamp_kernels.configs import Config, config_for
from patchclamp_kernels.runtime import accumulation_dtype, check, check_tensor, uses_kernel

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
OP = "rope_kv_write"
MAX_HEAD_DIM = 256


def rope_kv_write_reference(
    qkv: Tensor,
    cos: Tensor | None,
    signed_sin: Tensor | None,
    positions: Tensor,
    slots: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    *,
    n_heads: int,
    q_norm: Tensor | None = None,
    k_norm: Tensor | None = None,
    eps: float = 0.0,
) -> Tensor:
    n_kv, dim = key_cache.shape[2:]
    exact = accumulation_dtype(qkv.dtype)
    heads = qkv.view(-1, n_heads + 2 * n_kv, dim)
    q, k, v = heads.split([n_heads, n_kv, n_kv], dim=1)

    def turned(x: Tensor, norm: Tensor | None) -> Tensor:
        y = x.to(exact)
        if norm is not None:
            y = y * (y.square().mean(-1, keepdim=True) + eps).rsqrt() * norm.to(exact)
            y = y.to(x.dtype).to(exact)
        if cos is not None and signed_sin is not None:
            rotary = cos.shape[1]
            first = y[..., :rotary]
            turn, partner = cos[positions].to(exact)[:, None], signed_sin[positions].to(exact)[:, None]
            y = torch.cat((first * turn + first.roll(rotary // 2, -1) * partner, y[..., rotary:]), dim=-1)
        return y.to(x.dtype)

    kept = slots >= 0
    key_cache.view(-1, n_kv, dim)[slots[kept]] = turned(k, k_norm)[kept]
    value_cache.view(-1, n_kv, dim)[slots[kept]] = v[kept]
    return turned(q, q_norm)


@triton.jit
def rope_kv_write_kernel(
    qkv,
    cos,
    signed_sin,
    positions,
    slots,
    q_norm,
    k_norm,
    out,
    key_cache,
    value_cache,
    eps,
    N_HEADS: tl.constexpr,
    N_KV: tl.constexpr,
    DIM: tl.constexpr,
    DIM_PAD: tl.constexpr,
    ROTARY: tl.constexpr,
    HEADS: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    heads = tl.program_id(1) * HEADS + tl.arange(0, HEADS)
    columns = tl.arange(0, DIM_PAD)
    used = columns < DIM
    is_query = heads < N_HEADS
    is_value = heads >= N_HEADS + N_KV
    inside = (heads < N_HEADS + 2 * N_KV)[:, None] & used[None, :]

    source = qkv + row * ((N_HEADS + 2 * N_KV) * DIM) + heads[:, None] * DIM
    x = tl.load(source + columns[None, :], mask=inside, other=0.0)
    y = x.to(tl.float32)
    if q_norm is not None:
        inverse = tl.rsqrt(tl.sum(y * y, axis=1) / DIM + eps)
        y = (y * inverse[:, None] * _norm_weight(q_norm, k_norm, columns, used, is_query)).to(x.dtype).to(tl.float32)
    if ROTARY > 0:
        position = tl.load(positions + row)
        turns = columns < ROTARY
        partner = tl.where(columns < ROTARY // 2, columns + ROTARY // 2, columns - ROTARY // 2)
        other = tl.load(source + partner[None, :], mask=inside & turns[None, :], other=0.0).to(tl.float32)
        if q_norm is not None:
            weight = _norm_weight(q_norm, k_norm, partner, turns, is_query)
            other = (other * inverse[:, None] * weight).to(x.dtype).to(tl.float32)
        c = tl.load(cos + position * ROTARY + columns, mask=turns, other=1.0).to(tl.float32)
        s = tl.load(signed_sin + position * ROTARY + columns, mask=turns, other=0.0).to(tl.float32)
        y = y * c[None, :] + other * s[None, :]
    turned = y.to(x.dtype)

    to_query = out + row * (N_HEADS * DIM) + heads[:, None] * DIM + columns[None, :]
    tl.store(to_query, turned, mask=inside & is_query[:, None])
    slot = tl.load(slots + row)
    cached = slot * (N_KV * DIM)
    is_key = (slot >= 0) & (heads >= N_HEADS) & (heads < N_HEADS + N_KV)
    to_key = key_cache + cached + (heads - N_HEADS)[:, None] * DIM + columns[None, :]
    tl.store(to_key, turned, mask=inside & is_key[:, None])
    to_value = value_cache + cached + (heads - N_HEADS - N_KV)[:, None] * DIM + columns[None, :]
    tl.store(to_value, x, mask=inside & ((slot >= 0) & is_value)[:, None])


@triton.jit
def _norm_weight(q_norm, k_norm, columns, used, is_query):
    """Returns [HEADS, DIM_PAD]: the weight of each row's own norm."""
    of_query = tl.load(q_norm + columns, mask=used, other=0.0).to(tl.float32)
    of_key = tl.load(k_norm + columns, mask=used, other=0.0).to(tl.float32)
    return tl.where(is_query[:, None], of_query[None, :], of_key[None, :])


def rope_kv_write(
    qkv: Tensor,
    cos: Tensor | None,
    signed_sin: Tensor | None,
    positions: Tensor,
    slots: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    *,
    n_heads: int,
    q_norm: Tensor | None = None,
    k_norm: Tensor | None = None,
    eps: float = 0.0,
    out: Tensor | None = None,
    config: Config | None = None,
) -> Tensor:
    """Returns rotated q [T, H, D]; k and v go to the caches [n_blocks, block_size, KV, D]. `out` may not overlap `qkv`.

    `cos` and `signed_sin` may be in the dtype of `qkv` or float32; without them nothing is rotated. The caller promises
    that positions lie within the tables and addresses within the caches: a device is not asked.
    """
    check(n_heads >= 1, f"n_heads is {n_heads}, not positive")
    check(qkv.dtype in DTYPES, f"qkv is {qkv.dtype}, not one of {DTYPES}")
    check(key_cache.ndim == 4, f"key_cache has shape {list(key_cache.shape)}, not [n_blocks, block_size, KV, D]")
    device, dtype = qkv.device, (qkv.dtype,)
    n_kv, dim = key_cache.shape[2:]
    check(0 < dim <= MAX_HEAD_DIM, f"key_cache has head_dim {dim}, not 1 to {MAX_HEAD_DIM}")
    check(n_kv >= 1, "key_cache has no heads")
    rows = qkv.shape[0]
    check_tensor("key_cache", key_cache, shape=(None,) * 4, dtypes=dtype, device=device)
    check_tensor("value_cache", value_cache, shape=tuple(key_cache.shape), dtypes=dtype, device=device)
    check_tensor("qkv", qkv, shape=(rows, (n_heads + 2 * n_kv) * dim), dtypes=dtype, device=device)
    check_tensor("positions", positions, shape=(rows,), dtypes=(torch.int64,), device=device)
    check_tensor("slots", slots, shape=(rows,), dtypes=(torch.int64,), device=device)
    check((cos is None) == (signed_sin is None), "cos and signed_sin must be given together")
    rotary = 0
    if cos is not None and signed_sin is not None:
        check_tensor("cos", cos, shape=(None, None), dtypes=(*dtype, torch.float32), device=device)
        rotary = cos.shape[1]
        check(0 < rotary <= dim and rotary % 2 == 0, f"cos has {rotary} columns, not an even number up to {dim}")
        check_tensor("signed_sin", signed_sin, shape=tuple(cos.shape), dtypes=(cos.dtype,), device=device)
    check((q_norm is None) == (k_norm is None), "q_norm and k_norm must be given together")
    if q_norm is not None and k_norm is not None:
        check_tensor("q_norm", q_norm, shape=(dim,), dtypes=(*dtype, torch.float32), device=device)
        check_tensor("k_norm", k_norm, shape=(dim,), dtypes=(q_norm.dtype,), device=device)
    if out is None:
        out = torch.empty((rows, n_heads, dim), dtype=qkv.dtype, device=device)
    else:
        check_tensor("out", out, shape=(rows, n_heads, dim), dtypes=dtype, device=device)
    if rows == 0:
        return out
    if not uses_kernel(qkv):
        return out.copy_(
            rope_kv_write_reference(
                qkv,
                cos,
                signed_sin,
                positions,
                slots,
                key_cache,
                value_cache,
                n_heads=n_heads,
                q_norm=q_norm,
                k_norm=k_norm,
                eps=eps,
            )
        )
    if config is None:
        config = config_for(OP, f"d{dim}", _default(dim), device)
    heads = config.blocks["HEADS"]
    rope_kv_write_kernel[(rows, triton.cdiv(n_heads + 2 * n_kv, heads))](
        qkv,
        cos,
        signed_sin,
        positions,
        slots,
        q_norm,
        k_norm,
        out,
        key_cache,
        value_cache,
        eps,
        N_HEADS=n_heads,
        N_KV=n_kv,
        DIM=dim,
        DIM_PAD=triton.next_power_of_2(dim),
        ROTARY=rotary,
        HEADS=heads,
        num_warps=config.num_warps,
        num_stages=config.num_stages,
    )
    return out


def _default(dim: int) -> Config:
    # 1,024 elements for 128 threads: 16 bytes of bfloat16 each.
    return Config({"HEADS": max(1, 1024 // triton.next_power_of_2(dim))}, num_warps=4, num_stages=1)


def compile_cases() -> list[CompileCase]:
    pointers = ("qkv", "cos", "signed_sin", "q_norm", "k_norm", "out", "key_cache", "value_cache")

    def case(name: str, n_heads: int, absent: tuple[str, ...]) -> CompileCase:
        signature = {p: "*bf16" for p in pointers if p not in absent}
        return CompileCase(
            name=name,
            kernel=rope_kv_write_kernel,
            signature={**signature, "positions": "*i64", "slots": "*i64", "eps": "fp32"},
            constexprs={
                **dict.fromkeys(absent),
                **{"N_HEADS": n_heads, "N_KV": 8, "DIM": 128, "DIM_PAD": 128, "ROTARY": 128},
            },
            config=_default(128),
        )

    return [case("llama-3-8b", 32, ("q_norm", "k_norm")), case("qwen3-1.7b", 16, ())]


def tuning_cases(device: torch.device) -> list[TuningCase]:
    """Tunes 256 decode rows of Llama-3-8B."""
    n_heads, n_kv, dim, rows, block = 32, 8, 128, 256, 16
    qkv = torch.randn(rows, (n_heads + 2 * n_kv) * dim, dtype=torch.bfloat16, device=device)
    table = torch.randn(4096, dim, dtype=torch.bfloat16, device=device)
    index = torch.arange(rows, device=device)
    cache = torch.zeros(2, rows // block, block, n_kv, dim, dtype=torch.bfloat16, device=device)
    candidates = [Config({"HEADS": heads}, warps, 1) for heads in (2, 4, 8, 16) for warps in (1, 2, 4, 8)]

    def run(config: Config) -> Tensor:
        return rope_kv_write(qkv, table, table, index, index, cache[0], cache[1], n_heads=n_heads, config=config)

    return [TuningCase(OP, f"d{dim}", tuple(candidates), run)]
