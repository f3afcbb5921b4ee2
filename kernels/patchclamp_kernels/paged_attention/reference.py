"""The definition of `paged_attention` in plain torch has full probability matrices, one sequence at a time."""

import torch
from torch import Tensor

from patchclamp_kernels.paged_attention.batch import Attended, RaggedBatch, Streaming
from patchclamp_kernels.runtime import accumulation_dtype


def paged_attention_reference(
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
) -> Attended:
    """Probabilities and masses are in the accumulation dtype; rows that belong to no sequence are 0 (argmax -1)."""
    rows, n_heads, dim = q.shape
    n_kv = key_cache.shape[2]
    exact = accumulation_dtype(q.dtype)
    z = q.new_zeros((rows, n_heads, dim))
    argmax = torch.full((rows, n_heads), -1, dtype=torch.int32, device=q.device)
    probability = torch.zeros((rows, n_heads), dtype=exact, device=q.device)
    mass, off = torch.zeros_like(probability), torch.zeros_like(probability)
    starts, contexts = batch.query_starts.tolist(), batch.context_lengths.tolist()
    for s, context in enumerate(contexts):
        mine = slice(starts[s], starts[s + 1])
        n = mine.stop - mine.start
        if context == 0 or n == 0:
            continue
        blocks = batch.block_tables[s, : -(-context // batch.block_size)].long()
        k, v = (
            cache[blocks].flatten(0, 1)[:context].to(exact).repeat_interleave(n_heads // n_kv, dim=1)
            for cache in (key_cache, value_cache)
        )
        scores = torch.einsum("nhd,khd->nhk", q[mine].to(exact), k) * scale
        if soft_cap:
            scores = torch.tanh(scores / soft_cap) * soft_cap
        keys = torch.arange(context, device=q.device)[None, None]  # [1, 1, keys]
        positions = torch.arange(context - n, context, device=q.device)[:, None, None]  # [n, 1, 1]
        visible = keys <= positions
        if window:
            visible = visible & (positions - keys < window)
        if streaming is not None:
            near = (keys < streaming.sink) | (positions - keys < streaming.recent)
            visible = visible & (near | ~streaming.heads.bool()[None, :, None])
        weights = torch.softmax(scores.masked_fill(~visible, float("-inf")), dim=-1)
        attended = torch.einsum("nhk,khd->nhd", weights, v)
        if head_scale is not None:
            attended = attended * head_scale[mine, :, None].to(exact)
        z[mine] = attended.to(q.dtype)
        best, first = weights.max(dim=-1, keepdim=True)
        # torch promises no order among equals.
        first = torch.where(weights == best, keys, context).amin(dim=-1)
        argmax[mine], probability[mine] = first.to(torch.int32), best[..., 0]
        if context > 1:
            off[mine] = weights[..., 1:].amax(dim=-1)
        if marked is not None:
            low, high = (marked[mine, i, None, None] for i in (0, 1))
            mass[mine] = torch.where((keys >= low) & (keys < high), weights, 0.0).sum(dim=-1)
    return Attended(
        z=z.view(rows, n_heads * dim),
        argmax=argmax if readout else None,
        probability=probability if readout else None,
        marked_mass=None if marked is None else mass,
        off_sink=off if off_sink else None,
    )
