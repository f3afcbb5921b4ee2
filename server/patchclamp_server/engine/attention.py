"""Attention of a ragged batch over the paged KV cache: the CPU path, and the reference for kernels.

    z_h = Σ_j softmax_j(cap(q_h · k_j · scale)) v_j      over keys j ≤ position, j > position - window

q [T, n_heads, head_dim]; the pool of a layer is [2, n_blocks, block_size, n_kv_heads, head_dim] (keys, values). Rows
that bring one token (decode) are computed together over their padded block tables; a chunk of a prompt is computed over
its own. Block 0 is never given out and stays zero: padded entries of a block table point at it.
"""

from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor


@dataclass(frozen=True, eq=False)
class Span:
    """Rows [start, start + n) of the batch are consecutive tokens of one sequence, the first at position `offset`."""

    start: int
    n: int
    offset: int
    blocks: list[int]


class AttentionBatch:
    """Index tensors and masks of one step, shared by all layers."""

    def __init__(self, spans: list[Span], block_size: int, windows: set[int], device: torch.device) -> None:
        self.single = [s for s in spans if s.n == 1]
        if any(s.n == 1 and s.start != i for i, s in enumerate(self.single)):
            raise ValueError("single-token spans must be the first rows of the batch")
        self.chunks = [_Chunk(s, block_size, windows, device) for s in spans if s.n > 1]
        self.masks: dict[int, Tensor] = {}
        if not self.single:
            return
        # Block tables of all single-token rows, padded with block 0.
        width = max(s.offset // block_size + 1 for s in self.single)
        table = np.zeros((len(self.single), width), dtype=np.int64)
        for i, s in enumerate(self.single):
            used = s.offset // block_size + 1
            table[i, :used] = s.blocks[:used]
        self.table = torch.from_numpy(table.reshape(-1)).to(device)
        positions = np.array([s.offset for s in self.single])[:, None]
        keys = np.arange(width * block_size)[None]
        for window in windows:
            visible = keys <= positions
            if window:
                visible &= positions - keys < window
            mask = np.where(visible, np.float32(0), np.float32("-inf"))
            self.masks[window] = torch.from_numpy(mask).to(device)[:, None, None]  # [B, 1, 1, keys]


class _Chunk:
    def __init__(self, span: Span, block_size: int, windows: set[int], device: torch.device) -> None:
        self.rows = slice(span.start, span.start + span.n)
        self.length = span.offset + span.n
        n_blocks = (self.length + block_size - 1) // block_size
        self.table = torch.tensor(span.blocks[:n_blocks], dtype=torch.int64, device=device)
        # The first chunk of a prompt needs no cache: its keys are its own rows.
        self.fresh = span.offset == 0
        positions = torch.arange(span.offset, self.length, device=device)[:, None]
        keys = torch.arange(self.length, device=device)[None]
        self.masks: dict[int, Tensor | None] = {}
        for window in windows:
            if self.fresh and (not window or self.length <= window):
                self.masks[window] = None
                continue
            visible = keys <= positions
            if window:
                visible &= positions - keys < window
            self.masks[window] = torch.where(visible, 0.0, float("-inf"))


def _attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float, soft_cap: float) -> Tensor:
    """q [B, H, n, D], k and v [B, H, keys, D]; mask None is causal."""
    if not soft_cap:
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None, scale=scale)
    scores = torch.tanh(q @ k.transpose(-1, -2) * (scale / soft_cap)) * soft_cap
    if mask is None:
        mask = torch.full(scores.shape[-2:], float("-inf"), device=q.device).triu(1)
    return torch.softmax(scores + mask, dim=-1) @ v


def paged_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    pool: Tensor,
    slots: Tensor,
    batch: AttentionBatch,
    *,
    scale: float,
    window: int,
    soft_cap: float,
) -> Tensor:
    """Writes k and v [T, n_kv_heads, head_dim] at the token addresses `slots`, then attends.

    Returns z [T, n_heads * head_dim].
    """
    n_kv, dim = pool.shape[3:]
    n_heads = q.shape[1]
    group = n_heads // n_kv
    key_pool, value_pool = pool[0], pool[1]
    key_pool.view(-1, n_kv, dim).index_copy_(0, slots, k)
    value_pool.view(-1, n_kv, dim).index_copy_(0, slots, v)
    parts = []
    single = len(batch.single)
    if single:
        # The query heads of one KV head stand where query tokens would, so that no key is repeated.
        shape = (single, -1, n_kv, dim)
        keys = key_pool.index_select(0, batch.table).view(shape).transpose(1, 2)
        values = value_pool.index_select(0, batch.table).view(shape).transpose(1, 2)
        out = _attend(q[:single].reshape(single, n_kv, group, dim), keys, values, batch.masks[window], scale, soft_cap)
        parts.append(out.reshape(single, n_heads * dim))
    for chunk in batch.chunks:
        if chunk.fresh:
            keys, values = k[chunk.rows], v[chunk.rows]
        else:
            keys = key_pool.index_select(0, chunk.table).view(-1, n_kv, dim)[: chunk.length]
            values = value_pool.index_select(0, chunk.table).view(-1, n_kv, dim)[: chunk.length]
        keys = keys.transpose(0, 1).repeat_interleave(group, 0)[None]
        values = values.transpose(0, 1).repeat_interleave(group, 0)[None]
        out = _attend(q[chunk.rows].transpose(0, 1)[None], keys, values, chunk.masks[window], scale, soft_cap)
        parts.append(out[0].transpose(0, 1).reshape(-1, n_heads * dim))
    return parts[0] if len(parts) == 1 else torch.cat(parts)
