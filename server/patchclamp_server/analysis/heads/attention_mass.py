"""Attention of chosen pairs of positions, from the model's own queries and keys, a block of queries at a time.

    mass_h(t, j) = exp(s_htj - log Σ_i exp s_hti),   s_htj = cap(q_ht · k_hj · scale) over keys j ≤ t, j > t - window

The passes over the sequences are the decoder's own; beside each layer stand the scores [n_heads, BLOCK, T] of one block
of queries, and of the weights only those asked for are kept.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from patchclamp_server.analysis.documents import NoHooks, inputs_of, pools_for
from patchclamp_server.model.decoder import Block, Decoder

BLOCK = 64
NOWHERE = -1


@torch.inference_mode()
def attention_mass(decoder: Decoder, tokens: Tensor, targets: Tensor) -> Tensor:
    """Weights that the last n queries of tokens [T] put on targets [n, m] -> [n_layers, n_heads, n, m] on the CPU.

    A target NOWHERE, or out of the query's sight, gets 0.
    """
    spec = decoder.spec
    targets = targets.to(decoder.device)
    masses: list[Tensor] = []

    def hear(layer: int, q: Tensor, k: Tensor) -> None:
        found = _mass(q, k, targets, spec.attention_scale, spec.windows[layer], spec.attention_soft_cap)
        masses.append(found.cpu())

    listening = _Listening(decoder, hear)
    document = tokens[None]
    listening.forward(inputs_of(document, 0, len(tokens), decoder), pools_for(decoder, document), NoHooks())
    return torch.stack(masses)


class _Listening(Decoder):
    """A decoder with the weights of another, that tells the queries and keys of each layer."""

    def __init__(self, decoder: Decoder, hear: Callable[[int, Tensor, Tensor], None]) -> None:
        super().__init__(
            decoder.spec,
            decoder.embedding,
            decoder.position_embedding,
            decoder.rotary,
            decoder.blocks,
            decoder.final_norm,
            decoder.unembedding,
        )
        self._hear = hear

    def _qkv(
        self, block: Block, layer: int, h: Tensor, rotary: tuple[Tensor, Tensor] | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        q, k, v = super()._qkv(block, layer, h, rotary)
        self._hear(layer, q, k)
        return q, k, v


def _mass(q: Tensor, k: Tensor, targets: Tensor, scale: float, window: int, soft_cap: float) -> Tensor:
    """q [T, n_heads, head_dim], k [T, n_kv_heads, head_dim], targets [n, m] -> [n_heads, n, m]."""
    length, n_heads, dim = q.shape
    n_kv = k.shape[1]
    keys = k.float().permute(1, 2, 0)  # [n_kv, head_dim, T]
    positions = torch.arange(length, device=q.device)
    first = length - len(targets)
    parts = []
    for start in range(first, length, BLOCK):
        end = min(start + BLOCK, length)
        # The query heads of one KV head stand side by side, so that no key is repeated.
        rows = q[start:end].float().view(end - start, n_kv, n_heads // n_kv, dim).permute(1, 2, 0, 3)
        scores = (rows.reshape(n_kv, -1, dim) @ keys[:, :, :end]).view(n_heads, end - start, end) * scale
        if soft_cap:
            scores = torch.tanh(scores / soft_cap) * soft_cap
        distance = positions[start:end, None] - positions[None, :end]
        hidden = distance < 0
        if window:
            hidden |= distance >= window
        scores = scores.masked_fill(hidden, float("-inf"))
        wanted = targets[start - first : end - first].expand(n_heads, -1, -1)
        weights = (scores.gather(2, wanted.clamp_min(0)) - scores.logsumexp(2, keepdim=True)).exp()
        parts.append(weights.masked_fill(wanted == NOWHERE, 0.0))
    return torch.cat(parts, dim=1)
