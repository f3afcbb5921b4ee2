"""Attention of chosen pairs of positions, from the model's own queries and keys, a block of queries at a time.

    mass_h(t, j) = exp(s_htj - log Σ_i exp s_hti),   s_htj = cap(q_ht · k_hj · scale) over keys j ≤ t, j > t - window

The passes over the sequences are the decoder's own: queries are read at their site, keys from the KV pool. Beside each
layer stand the scores [n_heads, BLOCK, T] of one block of queries, and of the weights only those asked for are kept.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from patchclamp_server.analysis.documents import forward, inputs_of, pool_for
from patchclamp_server.engine.exclusive import Sliced
from patchclamp_server.model.attention.paged import key_columns, visible_scores
from patchclamp_server.model.attention.pools import Pool
from patchclamp_server.model.decoder import Decoder, StepInputs
from patchclamp_server.model.sites import Site
from patchclamp_server.model.spec import DecoderSpec

BLOCK = 64
NOWHERE = -1


def attention_mass(decoder: Decoder, tokens: Tensor, targets: Tensor) -> Sliced[Tensor]:
    """Returns the weights [n_layers, n_heads, n, m] of the last n queries of tokens [T] on targets [n, m], on the CPU.

    A target NOWHERE, or out of the query's sight, gets 0.
    """
    document = tokens[None]
    every_layer = frozenset(range(decoder.spec.n_layers))
    step = replace(inputs_of(document, 0, len(tokens), decoder), visited_queries=every_layer)
    pools = pool_for(decoder, document)
    reader = _MassReader(decoder.spec, step, pools, targets.to(decoder.device))
    yield from forward(decoder, step, pools, reader)
    return torch.stack(reader.masses)


@dataclass(eq=False)
class _MassReader:
    """Computes the masses of a layer when its keys are in the pool."""

    visited = None

    spec: DecoderSpec
    step: StepInputs
    pools: Sequence[Pool]
    targets: Tensor
    queries: Tensor = field(init=False)
    masses: list[Tensor] = field(default_factory=list)

    def visit(self, site: Site, layer: int, x: Tensor) -> None:
        if site is Site.ATTN_Q:
            self.queries = x
        elif site is Site.ATTN_Z:
            keys = self.pools[layer].keys_at(self.step.slots)
            self.masses.append(_mass(self.spec, layer, self.queries, keys, self.targets).cpu())


def _mass(spec: DecoderSpec, layer: int, q: Tensor, keys: Tensor, targets: Tensor) -> Tensor:
    """Returns [n_heads, n, m] for q [T, n_heads * head_dim], keys [T, n_kv_heads, head_dim] and targets [n, m]."""
    length = len(keys)
    queries, columns = q.view(length, spec.n_heads, spec.head_dim), key_columns(keys)
    positions = torch.arange(length, device=q.device)
    first = length - len(targets)
    parts = []
    for start in range(first, length, BLOCK):
        end = min(start + BLOCK, length)
        scores = visible_scores(
            queries[start:end],
            positions[start:end],
            columns[:, :, :end],
            scale=spec.attention_scale,
            window=spec.windows[layer],
            soft_cap=spec.attention_soft_cap,
        )
        wanted = targets[start - first : end - first].expand(spec.n_heads, -1, -1)
        weights = (scores.gather(2, wanted.clamp_min(0)) - scores.logsumexp(2, keepdim=True)).exp()
        parts.append(weights.masked_fill(wanted == NOWHERE, 0.0))
    return torch.cat(parts, dim=1)
