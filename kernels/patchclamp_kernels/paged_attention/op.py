"""This checked entrance of `paged_attention` chooses the kernels that a batch needs, and launches them."""

from dataclasses import dataclass

import torch
import triton
from torch import Tensor

from patchclamp_kernels.configs import Config, config_for
from patchclamp_kernels.paged_attention.batch import Attended, RaggedBatch, Streaming
from patchclamp_kernels.paged_attention.decode import MAX_SPLITS, combine_kernel, decode_kernel
from patchclamp_kernels.paged_attention.prefill import prefill_kernel
from patchclamp_kernels.paged_attention.reference import paged_attention_reference
from patchclamp_kernels.paged_attention.scores import exponent_scale
from patchclamp_kernels.runtime import check, check_tensor, uses_kernel

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
DECODE = "paged_attention_decode"
PREFILL = "paged_attention_prefill"
COMBINE = Config({"CHUNK": 16}, num_warps=4, num_stages=2)
MAX_HEAD_DIM = 256
_OUTPUTS = ("z", "argmax", "probability", "marked_mass", "off_sink")
# Numbers of a split: its maximum, sum, argmax, marked mass, and its maximum off the sink.
_STATS = 5


def paged_attention(
    q: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    batch: RaggedBatch,
    *,
    scale: float,
    window: int = 0,
    soft_cap: float = 0.0,
    head_scale: Tensor | None = None,
    streaming: Streaming | None = None,
    readout: bool = False,
    off_sink: bool = False,
    marked: Tensor | None = None,
    out: Attended | None = None,
    scratch: Tensor | None = None,
    config: Config | None = None,
    prefill_config: Config | None = None,
) -> Attended:
    """Attends with q [T, H, D] to key_cache and value_cache [n_blocks, block_size, KV, D] of one dtype; KV divides H.

    With `window` > 0 a row sees keys of position > its own - window. With `soft_cap` > 0 scores are
    cap · tanh(s / cap). `head_scale` float32 [T, H] multiplies the heads of z. `readout` asks for argmax and
    probability, `off_sink` for the largest weight of a key that is not at position 0, `marked` int32 [T, 2] for the
    mass on key positions lo ≤ j < hi of each row. `out` may bring every tensor that is returned, and `scratch` float32
    memory of at least `scratch_floats`. Rows that belong to no sequence are not written.

    Raises ValueError naming the argument. The caller promises that block ids lie within the cache, because a device is
    not asked.
    """
    check(q.ndim == 3, f"q has shape {list(q.shape)}, not [T, H, D]")
    check(q.dtype in DTYPES, f"q is {q.dtype}, not one of {DTYPES}")
    check(key_cache.ndim == 4, f"key_cache has shape {list(key_cache.shape)}, not [n_blocks, block_size, KV, D]")
    device, dtype = q.device, (q.dtype,)
    rows, n_heads, dim = q.shape
    n_kv = key_cache.shape[2]
    check(0 < dim <= MAX_HEAD_DIM, f"q has head_dim {dim}, not 1 to {MAX_HEAD_DIM}")
    check(n_kv > 0 and n_heads > 0 and n_heads % n_kv == 0, f"q has {n_heads} heads for {n_kv} key heads")
    _check_batch(batch, rows, device)
    cache_shape = (None, batch.block_size, n_kv, dim)
    check_tensor("q", q, shape=(rows, n_heads, dim), dtypes=dtype, device=device)
    check_tensor("key_cache", key_cache, shape=cache_shape, dtypes=dtype, device=device)
    check_tensor("value_cache", value_cache, shape=tuple(key_cache.shape), dtypes=dtype, device=device)
    check(window >= 0, f"window is {window}, not 0 or more")
    check(soft_cap >= 0, f"soft_cap is {soft_cap}, not 0 or more")
    if head_scale is not None:
        check_tensor("head_scale", head_scale, shape=(rows, n_heads), dtypes=(torch.float32,), device=device)
    if marked is not None:
        check_tensor("marked", marked, shape=(rows, 2), dtypes=(torch.int32,), device=device)
    if streaming is not None:
        flags = (torch.bool, torch.int32)
        check_tensor("streaming.heads", streaming.heads, shape=(n_heads,), dtypes=flags, device=device)
        check(streaming.sink >= 0, f"streaming.sink is {streaming.sink}, not 0 or more")
        check(streaming.recent >= 1, f"streaming.recent is {streaming.recent}, not positive")
    out = _outputs(out, q, readout, marked is not None, off_sink)
    if rows == 0:
        return out
    if not uses_kernel(q):
        return _by_reference(
            out,
            paged_attention_reference(
                q,
                key_cache,
                value_cache,
                batch,
                scale=scale,
                window=window,
                soft_cap=soft_cap,
                head_scale=head_scale,
                streaming=streaming,
                readout=readout,
                off_sink=off_sink,
                marked=marked,
            ),
        )
    heads = None
    if streaming is not None:
        heads = streaming.heads.view(torch.uint8) if streaming.heads.dtype == torch.bool else streaming.heads
    base, ceiling = exponent_scale(scale, soft_cap)
    inputs: dict[str, object] = {
        "q": q,
        "key_cache": key_cache,
        "value_cache": value_cache,
        "block_tables": batch.block_tables,
        "context_lengths": batch.context_lengths,
        "head_scale": head_scale,
        "streaming_heads": heads,
        "marked": marked,
        "table_width": batch.block_tables.shape[1],
        "scale": base,
        "ceiling": ceiling,
        "window": window,
        "sink": streaming.sink if streaming else 0,
        "recent": streaming.recent if streaming else 0,
    }
    outputs = {name: getattr(out, name) for name in _OUTPUTS}
    shape = {"N_HEADS": n_heads, "DIM": dim, "DIM_PAD": padded(dim)}
    form = shape | {"N_KV": n_kv, "BLOCK_SIZE": batch.block_size, "HAS_CAP": soft_cap > 0, "HAS_WINDOW": window > 0}

    if batch.n_single:
        plan = split_plan(q, n_kv, batch, window, config)
        if plan.n_splits > 1:
            floats = batch.n_single * n_heads * plan.n_splits * (dim + _STATS)
            if scratch is None:
                scratch = torch.empty(floats, dtype=torch.float32, device=device)
            else:
                check_tensor("scratch", scratch, shape=(None,), dtypes=(torch.float32,), device=device)
                check(scratch.numel() >= floats, f"scratch has {scratch.numel()} floats, not {floats}")
        else:
            scratch = None
        decode_kernel[(batch.n_single * n_kv, plan.n_splits)](
            **inputs,
            **outputs,
            partials=scratch,
            n_splits=plan.n_splits,
            DIRECT=plan.n_splits == 1,
            GROUP_PAD=max(16, triton.next_power_of_2(n_heads // n_kv)),
            **form,
            **plan.config.blocks,
            num_warps=plan.config.num_warps,
            num_stages=plan.config.num_stages,
        )
        if plan.n_splits > 1:
            combine_kernel[(batch.n_single, n_heads)](
                scratch,
                head_scale,
                **outputs,
                n_splits=plan.n_splits,
                **shape,
                **COMBINE.blocks,
                num_warps=COMBINE.num_warps,
                num_stages=COMBINE.num_stages,
            )
    if len(batch.tiles):
        if prefill_config is None:
            hopper = q.is_cuda and torch.cuda.get_device_capability(device)[0] >= 9
            default = prefill_default(dim, q.element_size(), hopper)
            prefill_config = config_for(PREFILL, f"d{dim}-{8 * q.element_size()}", default, device)
        tokens = min(prefill_config.blocks["ROWS"], batch.tile_rows)
        prefill_kernel[(n_heads, len(batch.tiles) * (batch.tile_rows // tokens))](
            **inputs,
            **outputs,
            query_starts=batch.query_starts,
            tiles=batch.tiles,
            tile_rows=batch.tile_rows,
            **form,
            ROWS=tokens,
            TILE=prefill_config.blocks["TILE"],
            num_warps=prefill_config.num_warps,
            num_stages=prefill_config.num_stages,
        )
    return out


@dataclass(frozen=True)
class SplitPlan:
    """Tells how the decode rows of a batch are split: at least SPLIT keys a split, and at most `n_splits` splits."""

    config: Config
    n_splits: int


def split_plan(q: Tensor, n_kv: int, batch: RaggedBatch, window: int, config: Config | None = None) -> SplitPlan:
    """Plans splits from shapes and host integers alone."""
    _, n_heads, dim = q.shape
    if config is None:
        programs = triton.next_power_of_2(batch.n_single * n_kv)
        bucket = f"d{dim}-{8 * q.element_size()}-g{n_heads // n_kv}-p{programs}"
        config = config_for(DECODE, bucket, decode_default(dim, q.element_size(), programs), q.device)
    blocks = dict(config.blocks)
    limit = blocks.pop("SPLITS")
    tile, split = blocks["TILE"], blocks["SPLIT"]
    # A window begins anywhere in its first tile.
    longest = min(batch.max_context, window + tile) if window else batch.max_context
    n_splits = max(1, min(triton.cdiv(longest, split), limit, MAX_SPLITS))
    return SplitPlan(Config(blocks, config.num_warps, config.num_stages), n_splits)


def scratch_floats(q: Tensor, n_kv: int, batch: RaggedBatch, window: int = 0, config: Config | None = None) -> int:
    """Returns how many float32 `scratch` must have: of each split a weighted sum of values and five numbers."""
    n_splits = split_plan(q, n_kv, batch, window, config).n_splits if batch.n_single else 1
    return batch.n_single * q.shape[1] * n_splits * (q.shape[2] + _STATS) if n_splits > 1 else 0


def padded(dim: int) -> int:
    """Returns the columns of a head in a kernel: a power of two that the tensor cores take."""
    return max(16, int(triton.next_power_of_2(dim)))


def decode_default(dim: int, element_size: int, programs: int) -> Config:
    """`programs` is S · KV: few of them want short splits so that every SM has one, many want no second pass."""
    # 16 KiB of keys and as much of values a tile. A stage is spent on either of the two loads that follow each other,
    # block ids and then keys: 5 keep two tiles in flight.
    tile = min(128, max(16, 16384 // (padded(dim) * element_size)))
    split, limit = (256, 128) if programs <= 64 else (512, 16) if programs <= 1024 else (1024, 8)
    return Config({"TILE": tile, "SPLIT": split, "SPLITS": limit}, num_warps=4, num_stages=5)


def prefill_default(dim: int, element_size: int, hopper: bool = False) -> Config:
    if element_size > 2:
        # Exact products of float32 run on the ordinary cores: small tiles keep them in registers.
        return Config({"ROWS": 16, "TILE": 32}, num_warps=4, num_stages=1)
    if padded(dim) > 128:
        return Config({"ROWS": 64, "TILE": 32}, num_warps=8, num_stages=5)
    # 64 keys of 128 spill some registers before Hopper, whose tensor cores read the queries from shared memory.
    return Config({"ROWS": 128, "TILE": 64 if hopper else 32}, num_warps=8, num_stages=5)


def _check_batch(batch: RaggedBatch, rows: int, device: torch.device) -> None:
    index = (torch.int32,)
    n = batch.context_lengths.shape[0]
    check_tensor("batch.context_lengths", batch.context_lengths, shape=(None,), dtypes=index, device=device)
    check_tensor("batch.query_starts", batch.query_starts, shape=(n + 1,), dtypes=index, device=device)
    check_tensor("batch.block_tables", batch.block_tables, shape=(n, None), dtypes=index, device=device)
    check_tensor("batch.tiles", batch.tiles, shape=(None, 2), dtypes=index, device=device)
    check(0 <= batch.n_single <= min(n, rows), f"batch.n_single is {batch.n_single} of {n} sequences and {rows} rows")
    size = batch.block_size
    check(size >= 1 and size & (size - 1) == 0, f"batch.block_size is {size}, not a power of two")
    tile = batch.tile_rows
    check(tile >= 16 and tile & (tile - 1) == 0, f"batch.tile_rows is {tile}, not a power of two from 16")


def _outputs(out: Attended | None, q: Tensor, readout: bool, marks: bool, off_sink: bool) -> Attended:
    """Checks `out`, or makes new tensors."""
    rows, n_heads, dim = q.shape

    def numbers(dtype: torch.dtype) -> Tensor:
        return torch.empty((rows, n_heads), dtype=dtype, device=q.device)

    if out is None:
        return Attended(
            z=torch.empty((rows, n_heads * dim), dtype=q.dtype, device=q.device),
            argmax=numbers(torch.int32) if readout else None,
            probability=numbers(torch.float32) if readout else None,
            marked_mass=numbers(torch.float32) if marks else None,
            off_sink=numbers(torch.float32) if off_sink else None,
        )
    check_tensor("out.z", out.z, shape=(rows, n_heads * dim), dtypes=(q.dtype,), device=q.device)
    wanted = (
        ("argmax", out.argmax, readout, torch.int32),
        ("probability", out.probability, readout, torch.float32),
        ("marked_mass", out.marked_mass, marks, torch.float32),
        ("off_sink", out.off_sink, off_sink, torch.float32),
    )
    for name, tensor, asked, dtype in wanted:
        check((tensor is not None) == asked, f"out.{name} is {'missing' if asked else 'not asked for'}")
        if tensor is not None:
            check_tensor(f"out.{name}", tensor, shape=(rows, n_heads), dtypes=(dtype,), device=q.device)
    return out


def _by_reference(out: Attended, exact: Attended) -> Attended:
    for name in _OUTPUTS:
        target, source = getattr(out, name), getattr(exact, name)
        if target is not None:
            target.copy_(source)
    return out
