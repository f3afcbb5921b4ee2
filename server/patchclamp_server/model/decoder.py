"""One forward pass over a ragged batch, with a seam at every site.

    x ← embed(tokens);  for each block: x ← x + attn(norm(x));  x ← x + mlp(norm(x));  hidden = norm(x)

The blocks of all families are one function driven by `DecoderSpec`: transformers supplies configuration, weights and
rotary frequencies, and is the oracle in the tests. Its own module code is not run: it multiplies q, k, v and gate, up
one by one, by matrices in a layout that streams badly for few rows (linear.py), and has no seams where edits could be
fused. It is not the number of operators that makes the difference in benchmarks/cpu.py: both issue some 2,200 a token.
"""

from collections.abc import Set
from dataclasses import dataclass
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from patchclamp_server.cpu.activations import ACTIVATION_FUNCTIONS
from patchclamp_server.cpu.invariant import operators
from patchclamp_server.cpu.linear import FEW_ROWS, Linear
from patchclamp_server.model.attention.batch import AttentionBatch, Span
from patchclamp_server.model.attention.paged import paged_attention
from patchclamp_server.model.attention.peaks import Peaks
from patchclamp_server.model.sites import Site
from patchclamp_server.model.spec import DecoderSpec


class SiteHooks(Protocol):
    """What a step does at the sites. `visit` edits the activation [T, width] in place."""

    def visit(self, site: Site, layer: int, x: Tensor, /) -> None: ...


class Untouched:
    """Hooks that do nothing."""

    def visit(self, site: Site, layer: int, x: Tensor, /) -> None:
        pass


@dataclass(frozen=True, eq=False)
class StepInputs:
    """Rows of one step, single-token rows first."""

    token_ids: Tensor  # [T] int64
    positions: Tensor  # [T] int64
    slots: Tensor  # [T] int64, token addresses in the KV pool
    attention: AttentionBatch
    # Layers at which Site.ATTN_Q is visited.
    edited_queries: Set[int] = frozenset()
    peaks: Peaks | None = None


class Norm:
    """RMS norm, or layer norm where there is a bias, over the last dimension."""

    def __init__(self, weight: Tensor, bias: Tensor | None, eps: float) -> None:
        self.weight = weight
        self.bias = bias
        self.eps = eps

    def __call__(self, x: Tensor) -> Tensor:  # [T, width]
        if operators.holds_for(x):
            if self.bias is None:
                return operators.rms_norm(x, self.weight, self.eps)
            return operators.layer_norm(x, self.weight, self.bias, self.eps)
        if self.bias is None:
            return F.rms_norm(x, self.weight.shape, self.weight, self.eps)
        return F.layer_norm(x, self.weight.shape, self.weight, self.bias, self.eps)


@dataclass(frozen=True, eq=False)
class Block:
    attn_norm: Norm
    qkv: Linear
    q_norm: Norm | None
    k_norm: Norm | None
    attn_output: Linear
    post_attn_norm: Norm | None
    mlp_norm: Norm
    mlp_input: Linear
    mlp_output: Linear
    post_mlp_norm: Norm | None
    # Weights of q_norm and k_norm for each head [n_heads + n_kv_heads, head_dim].
    head_norms: Tensor | None = None

    @property
    def head_eps(self) -> float:
        return 0.0 if self.q_norm is None else self.q_norm.eps


class Decoder:
    """A decoder-only transformer whose sites can be edited and read.

    Where it is `batch_invariant`, the bits of a row depend on nothing but its tokens and what its program does to them:
    neither on the other rows of a step, nor on where the tokens before it were cut into steps.
    """

    def __init__(
        self,
        spec: DecoderSpec,
        embedding: Tensor,
        position_embedding: Tensor | None,
        rotary: dict[str, tuple[Tensor, Tensor]],
        blocks: list[Block],
        final_norm: Norm,
        unembedding: Linear,
    ) -> None:
        self.batch_invariant = unembedding.batch_invariant
        self.spec = spec
        self.embedding = embedding  # [vocab, d_model]
        self.position_embedding = position_embedding  # [context, d_model]
        # cos and signed sin [context, rotary_dim] by rotary kind.
        self.rotary = rotary
        self.blocks = blocks
        self.final_norm = final_norm
        self.unembedding = unembedding
        self.windows = set(spec.windows)
        self.device = embedding.device
        self.dtype = embedding.dtype
        self._activation = ACTIVATION_FUNCTIONS[spec.activation]

    def warm_up(self) -> None:
        """Compiles what is compiled at run time, so that no request waits for it."""
        spec, block = self.spec, self.blocks[0]
        x = torch.zeros(1, spec.d_model, dtype=self.dtype, device=self.device)
        rotary = self.rotary.get(spec.rotary_kinds[0])
        self._qkv(block, 0, block.attn_norm(x), None if rotary is None else (rotary[0][:1], rotary[1][:1]))
        self._mlp(block, 0, x, Untouched())
        self.logits(x)
        if operators.holds_for(x):
            operators.warm_up()
        pool = torch.zeros(2, 2, 1, spec.n_kv_heads, spec.head_dim, dtype=self.dtype, device=self.device)
        row = torch.zeros(1, spec.n_heads, spec.head_dim, dtype=self.dtype, device=self.device)
        key, slot = row[:, : spec.n_kv_heads], torch.ones(1, dtype=torch.int64, device=self.device)
        batch = AttentionBatch([Span(0, 1, 0, [1])], 1, {0}, self.device)
        paged_attention(row, key, key, pool, slot, batch, scale=1.0, window=0, soft_cap=0.0)

    def threads_for(self, rows: int, available: int) -> int:
        """Threads worth using for a step: few rows over codes are done sooner by one than by waking the others."""
        return 1 if rows <= FEW_ROWS and self.unembedding.quantized is not None else available

    @torch.inference_mode()
    def forward(self, step: StepInputs, pools: list[Tensor], hooks: SiteHooks) -> Tensor:
        """Residual stream [T, d_model] at the end of the last block; writes the KV pools."""
        spec = self.spec
        x = F.embedding(step.token_ids, self.embedding)
        if spec.embedding_scale != 1.0:
            x = x * torch.tensor(spec.embedding_scale, dtype=x.dtype)
        if self.position_embedding is not None:
            x = x + F.embedding(step.positions, self.position_embedding)
        tables = {
            kind: (cos.index_select(0, step.positions), sin.index_select(0, step.positions))
            for kind, (cos, sin) in self.rotary.items()
        }
        for layer, block in enumerate(self.blocks):
            hooks.visit(Site.RESID_PRE, layer, x)
            rotary = tables.get(spec.rotary_kinds[layer])
            attn_out = self._attention(block, layer, block.attn_norm(x), step, pools[layer], rotary, hooks)
            hooks.visit(Site.ATTN_OUT, layer, attn_out)
            if spec.parallel_residual:
                mlp_out = self._mlp(block, layer, block.mlp_norm(x), hooks)
                x = x + attn_out
            else:
                x = x + attn_out
                hooks.visit(Site.RESID_MID, layer, x)
                mlp_out = self._mlp(block, layer, block.mlp_norm(x), hooks)
            hooks.visit(Site.MLP_OUT, layer, mlp_out)
            x = x + mlp_out
            hooks.visit(Site.RESID_POST, layer, x)
        return x

    @torch.inference_mode()
    def logits(self, x: Tensor) -> Tensor:
        """Unembeds residual states [N, d_model] -> [N, vocab], float32."""
        return self.unembed(self.final_norm(x))

    @torch.inference_mode()
    def unembed(self, h: Tensor) -> Tensor:
        """Logits of residual states after the final norm."""
        logits = self.unembedding(h).float()
        cap = self.spec.final_soft_cap
        if not cap:
            return logits
        return operators.cap_softly(logits, cap) if operators.holds_for(logits) else torch.tanh(logits / cap) * cap

    def _attention(
        self,
        block: Block,
        layer: int,
        h: Tensor,
        step: StepInputs,
        pool: Tensor,
        rotary: tuple[Tensor, Tensor] | None,
        hooks: SiteHooks,
    ) -> Tensor:
        spec = self.spec
        q, k, v = self._qkv(block, layer, h, rotary)
        if layer in step.edited_queries:
            q = q.contiguous()
            hooks.visit(Site.ATTN_Q, layer, q.view(len(q), -1))
        z = paged_attention(
            q,
            k,
            v,
            pool,
            step.slots,
            step.attention,
            scale=spec.attention_scale,
            window=spec.windows[layer],
            soft_cap=spec.attention_soft_cap,
            peaks=None if step.peaks is None else step.peaks.at(layer),
        )
        hooks.visit(Site.ATTN_Z, layer, z)
        out = block.attn_output(z)
        return out if block.post_attn_norm is None else block.post_attn_norm(out)

    def _qkv(
        self, block: Block, layer: int, h: Tensor, rotary: tuple[Tensor, Tensor] | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Queries [T, n_heads, head_dim], keys and values [T, n_kv_heads, head_dim], as they are attended with."""
        spec = self.spec
        qk_heads = spec.n_heads + spec.n_kv_heads
        qkv = block.qkv(h).view(h.shape[0], qk_heads + spec.n_kv_heads, spec.head_dim)
        if operators.holds_for(qkv):
            operators.finish_heads(qkv, qk_heads, block.head_norms, block.head_eps, rotary)
            return qkv[:, : spec.n_heads], qkv[:, spec.n_heads : qk_heads], qkv[:, qk_heads:]
        qk, v = qkv[:, :qk_heads], qkv[:, qk_heads:]
        if block.q_norm is not None and block.k_norm is not None:
            qk = torch.cat((block.q_norm(qk[:, : spec.n_heads]), block.k_norm(qk[:, spec.n_heads :])), dim=1)
        if rotary is not None:
            cos, signed_sin = rotary
            qk = _rotate(qk, cos[:, None], signed_sin[:, None])
        return qk[:, : spec.n_heads], qk[:, spec.n_heads :], v

    def _mlp(self, block: Block, layer: int, h: Tensor, hooks: SiteHooks) -> Tensor:
        hidden = block.mlp_input(h)
        if operators.holds_for(hidden):
            neurons = operators.activate(hidden, self.spec.activation, gated=self.spec.family.gated)
        elif self.spec.family.gated:
            gate, up = hidden.view(-1, 2, self.spec.d_ff).unbind(1)
            neurons = self._activation(gate) * up
        else:
            neurons = self._activation(hidden)
        hooks.visit(Site.MLP_POST, layer, neurons)
        out = block.mlp_output(neurons)
        return out if block.post_mlp_norm is None else block.post_mlp_norm(out)


def _rotate(qk: Tensor, cos: Tensor, signed_sin: Tensor) -> Tensor:
    """x cos + rotate_half(x) sin, as a roll by half: the sign of the first half is folded into `signed_sin`."""
    dim = cos.shape[-1]
    if dim == qk.shape[-1]:
        return torch.addcmul(qk * cos, torch.roll(qk, dim // 2, -1), signed_sin)
    turned, rest = qk[..., :dim], qk[..., dim:]
    turned = torch.addcmul(turned * cos, torch.roll(turned, dim // 2, -1), signed_sin)
    return torch.cat((turned, rest), dim=-1)
