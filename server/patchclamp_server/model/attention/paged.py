"""Attention of a ragged batch over the paged KV cache, for CPUs and as the reference for kernels.

    z_h = Σ_j softmax_j(cap(q_h · k_j · scale)) v_j      over keys j ≤ position, j > position - window

q is [T, n_heads, head_dim]; the keys and values of a layer are in its pool (pools.py). On a CPU in float32 the pool is
tiled, and row_attention.py computes all rows. Elsewhere rows that bring one token (decode) are computed together
over their padded block tables, and a chunk of a prompt over its own. Block 0 is never given out and stays zero: padded
entries of a block table point at it.
"""

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from patchclamp_server.model.arrays import IntArray
from patchclamp_server.model.attention.batch import AttentionBatch, is_visible
from patchclamp_server.model.attention.peaks import LayerPeaks
from patchclamp_server.model.attention.pools import Pool, TiledPool

# One block of rows whose peaks are read has at most so many scores [n_heads, rows, keys].
_PEAK_SCORES = 1 << 22


def _scaled(products: Tensor, scale: float, soft_cap: float) -> Tensor:
    """Returns cap(q · k · scale) of products q · k; a soft cap of 0 means none."""
    scores = products * scale
    return torch.tanh(scores / soft_cap) * soft_cap if soft_cap else scores


def visible_scores(
    q: Tensor, positions: Tensor, columns: Tensor, *, scale: float, window: int, soft_cap: float
) -> Tensor:
    """Returns the scores [n_heads, n, m] of queries for keys of their sequence, float32: -inf where one is not seen.

    q [n, n_heads, head_dim] are the queries of tokens at `positions` [n]; columns [n_kv_heads, head_dim, m] are the
    float32 keys of positions 0 to m - 1, as `key_columns` gives them.
    """
    n, n_heads, dim = q.shape
    n_kv, end = len(columns), columns.shape[2]
    # The query heads of one KV head stand side by side, so that no key is repeated.
    queries = q.float().view(n, n_kv, -1, dim).permute(1, 2, 0, 3)
    scores = _scaled((queries.reshape(n_kv, -1, dim) @ columns).view(n_heads, n, end), scale, soft_cap)
    hidden = ~is_visible(positions[:, None], torch.arange(end, device=q.device)[None], window)
    return scores.masked_fill_(hidden, float("-inf"))


def key_columns(keys: Tensor) -> Tensor:
    """Transposes keys [m, n_kv_heads, head_dim] to [n_kv_heads, head_dim, m] in float32."""
    return keys.float().permute(1, 2, 0)


def _attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float, soft_cap: float) -> Tensor:
    """Returns z of q [B, H, n, D], k and v [B, H, keys, D]; mask None is causal."""
    if not soft_cap:
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None, scale=scale)
    # Scores are in float32, as inside the other branch: float16 would overflow before the cap applies.
    scores = _scaled(q.float() @ k.float().transpose(-1, -2), scale, soft_cap)
    if mask is None:
        mask = torch.full(scores.shape[-2:], float("-inf"), device=q.device).triu(1)
    return torch.softmax(scores + mask, dim=-1).to(v.dtype) @ v


def paged_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    pool: Pool,
    slots: Tensor,
    batch: AttentionBatch,
    *,
    scale: float,
    window: int,
    soft_cap: float,
    peaks: LayerPeaks | None = None,
) -> Tensor:
    """Writes k and v [T, n_kv_heads, head_dim] at the token addresses `slots`, then attends; fills in `peaks`.

    Returns z [T, n_heads * head_dim]. Its bits do not depend on whether peaks are asked for. Where q, k and v are
    differentiated, torch's operators compute z on every device, and the pool stays as it is.
    """
    n_heads, (n_kv, dim) = q.shape[1], k.shape[1:]
    group = n_heads // n_kv
    differentiated = q.requires_grad or k.requires_grad or v.requires_grad
    if isinstance(pool, TiledPool) and not differentiated:
        # numba compiles these, and only this path needs numba.
        from patchclamp_server.model.attention.row_attention import attend_rows, write

        write(k, v, slots, pool)
        return attend_rows(q, pool, batch, scale=scale, window=window, soft_cap=soft_cap, peaks=peaks)
    key_pool, value_pool = pool.rows()
    if differentiated:
        # A pool that is written has no gradients: keys and values go into a copy of it.
        key_pool, value_pool = key_pool.index_copy(0, slots, k), value_pool.index_copy(0, slots, v)
    else:
        key_pool.index_copy_(0, slots, k)
        value_pool.index_copy_(0, slots, v)
    key_pool, value_pool = (x.view(-1, batch.block_size, n_kv, dim) for x in (key_pool, value_pool))
    parts = []
    single = batch.n_single
    if single:
        # The query heads of one KV head stand where query tokens would, so that no key is repeated.
        shape = (single, -1, n_kv, dim)
        keys = key_pool.index_select(0, batch.gathered).view(shape).transpose(1, 2)
        values = value_pool.index_select(0, batch.gathered).view(shape).transpose(1, 2)
        mask = batch.mask(window)
        out = _attend(q[:single].reshape(single, n_kv, group, dim), keys, values, mask, scale, soft_cap)
        parts.append(out.reshape(single, n_heads * dim))
        if peaks is not None:
            for row in peaks.rows[peaks.rows < single].tolist():
                last = int(batch.positions[row])
                own = keys[row, :, : last + 1].transpose(0, 1)
                _find_peaks(q, own, peaks, np.array([row]), np.array([last]), scale, window, soft_cap)
    for chunk in batch.chunks:
        if chunk.fresh:
            keys, values = k[chunk.rows], v[chunk.rows]
        else:
            keys = key_pool.index_select(0, chunk.table).view(-1, n_kv, dim)[: chunk.length]
            values = value_pool.index_select(0, chunk.table).view(-1, n_kv, dim)[: chunk.length]
        if peaks is not None:
            rows = peaks.rows[(peaks.rows >= chunk.rows.start) & (peaks.rows < chunk.rows.stop)]
            positions = rows - chunk.rows.start + chunk.offset
            _find_peaks(q, keys, peaks, rows, positions, scale, window, soft_cap)
        keys = keys.transpose(0, 1).repeat_interleave(group, 0)[None]
        values = values.transpose(0, 1).repeat_interleave(group, 0)[None]
        out = _attend(q[chunk.rows].transpose(0, 1)[None], keys, values, chunk.masks[window], scale, soft_cap)
        parts.append(out[0].transpose(0, 1).reshape(-1, n_heads * dim))
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def _find_peaks(
    q: Tensor,
    keys: Tensor,
    peaks: LayerPeaks,
    rows: IntArray,
    positions: IntArray,
    scale: float,
    window: int,
    soft_cap: float,
) -> None:
    """Fills in the peaks of `rows` of q: tokens at `positions` of one sequence with `keys` [n, n_kv_heads, head_dim].

    It takes a block of rows at a time, because the scores of all rows would be the attention matrix.
    """
    columns = key_columns(keys)
    step = max(1, _PEAK_SCORES // (q.shape[1] * len(keys)))
    for start in range(0, len(rows), step):
        own = torch.from_numpy(rows[start : start + step]).to(q.device)
        at = torch.from_numpy(positions[start : start + step]).to(q.device)
        end = int(positions[start : start + step].max()) + 1
        scores = visible_scores(
            q.index_select(0, own), at, columns[:, :, :end], scale=scale, window=window, soft_cap=soft_cap
        )
        # Among equals, max gives the first.
        largest, where = scores.max(dim=2)
        total = scores.logsumexp(dim=2)
        peaks.positions.index_copy_(0, own, where.t().to(torch.int32))
        peaks.probabilities.index_copy_(0, own, (largest - total).exp_().t())
        if peaks.off_sink is not None:
            # A row that sees the first key alone then has a column of -inf only, which becomes 0.
            scores[:, :, 0] = float("-inf")
            peaks.off_sink.index_copy_(0, own, (scores.amax(dim=2) - total).exp_().t())
