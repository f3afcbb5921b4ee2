"""The decoder has one forward pass over a ragged batch, with a seam at every site, at the products and at both ends.

    x ← embed(tokens);  for each block: x ← x + attn(norm(x));  x ← x + mlp(norm(x));  hidden = norm(x)

`Decoder.run_blocks` is the one function that runs blocks. Whatever runs a model calls it, and varies it at a seam:

- `hooks` read and edit activations at the sites, queries among them: programs, watches, circuits, attention patterns;
- `products` are the four matrix products of each block: dense, or those of sparse inference (sparsity/blocks.py);
- `x` and `layers` say where a run starts and which blocks it runs: one block alone, or those from a layer on.

On a CPU in float32, where products are dense and hooks say what they visit, the blocks between two visits are one
compiled call with the same bits (compiled/blocks.py); tests hold it against the loop here. On a GPU the blocks are run
by kernel_forward.py, which says why it has a loop of its own.

The blocks of all families are one function driven by `DecoderSpec`: transformers supplies configuration, weights and
rotary frequencies, and is the oracle in the tests. Its modules are not run: they multiply q, k, v and gate, up one by
one, by matrices in a layout that streams badly for few rows (cpu/linear.py), and have no seams where edits could be
fused.
"""

from collections.abc import Mapping, Sequence, Set
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from patchclamp_server.cpu.activations import neurons_of
from patchclamp_server.cpu.invariant import operators
from patchclamp_server.cpu.linear import Linear
from patchclamp_server.model.attention.batch import AttentionBatch
from patchclamp_server.model.attention.paged import paged_attention
from patchclamp_server.model.attention.peaks import Peaks
from patchclamp_server.model.attention.pools import KvPool, Pool, TiledPool
from patchclamp_server.model.attention.spans import Span
from patchclamp_server.model.embedding import Embedding
from patchclamp_server.model.row_operators import HeadNorms, Norm, cap_softly, finish_heads
from patchclamp_server.model.sites import PREACTIVATION_SITES, Site
from patchclamp_server.model.spec import DecoderSpec

if TYPE_CHECKING:
    from patchclamp_server.model.compiled.blocks import CompiledBlocks
    from patchclamp_server.model.compiled.job import CompiledVisits
    from patchclamp_server.model.compiled.sparse_rows import SparseRows


class SiteHooks(Protocol):
    """Defines what a step does at the sites. `visit` may edit the activation [T, width] in place.

    `visited`: the places at which that does anything, or None for all.
    """

    @property
    def visited(self) -> Set[tuple[Site, int]] | None: ...
    def visit(self, site: Site, layer: int, x: Tensor, /) -> None: ...


class NoHooks:
    """Hooks that do nothing."""

    visited: Set[tuple[Site, int]] = frozenset()

    def visit(self, site: Site, layer: int, x: Tensor, /) -> None:
        pass


NO_HOOKS = NoHooks()


class BlockProducts(Protocol):
    """The four matrix products of a block, with their biases. A `Block` has the dense ones."""

    @property
    def qkv(self) -> "Product": ...
    @property
    def attn_output(self) -> "Product": ...
    @property
    def mlp_input(self) -> "Product": ...
    @property
    def mlp_output(self) -> "Product": ...


class Product(Protocol):
    """Maps x [T, in] to [T, out]. Rows of the result do not depend on the values of other rows."""

    def __call__(self, x: Tensor, /) -> Tensor: ...


@dataclass(frozen=True, eq=False)
class StepInputs:
    """The rows of one step; single-token rows come first."""

    token_ids: Tensor  # [T] int64
    positions: Tensor  # [T] int64
    slots: Tensor  # [T] int64, token addresses in the KV pool
    attention: AttentionBatch
    # Site.ATTN_Q is visited at these layers only, because a visit needs contiguous queries.
    visited_queries: Set[int] = frozenset()
    # Places of Site.MLP_GATE and Site.MLP_UP that are visited: elsewhere gates and ups are not taken apart. True: with
    # a copy, whose rows have no gaps and which hooks may edit; False: with a view, which they only read.
    visited_preactivations: Mapping[tuple[Site, int], bool] = field(default_factory=dict)
    peaks: Peaks | None = None
    # What compiled blocks may call where hooks would be visited.
    compiled_visits: "CompiledVisits | None" = None
    # Rows whose MLPs compiled blocks compute sparsely; elsewhere `products` do.
    sparse: "SparseRows | None" = None


@dataclass(frozen=True, eq=False)
class Block:
    """The weights of one block. Only the sandwich families have norms after attention and after the MLP."""

    attn_norm: Norm
    qkv: Linear
    head_norms: HeadNorms | None
    attn_output: Linear
    post_attn_norm: Norm | None
    mlp_norm: Norm
    mlp_input: Linear
    mlp_output: Linear
    post_mlp_norm: Norm | None


class Decoder:
    """A decoder-only transformer whose sites can be edited and read.

    Where it is `batch_invariant`, the bits of a row depend only on its tokens and what its program does to them,
    neither on the other rows of a step, nor on where the tokens before it were cut into steps.
    """

    def __init__(
        self,
        spec: DecoderSpec,
        embedding: Embedding,
        position_embedding: Tensor | None,
        rotary: dict[str, tuple[Tensor, Tensor]],
        blocks: list[Block],
        final_norm: Norm,
        unembedding: Linear,
    ) -> None:
        self.batch_invariant = unembedding.batch_invariant
        self.spec = spec
        self.embedding = embedding
        self.position_embedding = position_embedding  # [context, d_model]
        # These are cos and signed sin [context, rotary_dim] by rotary kind.
        self.rotary = rotary
        self.blocks = blocks
        self.final_norm = final_norm
        self.unembedding = unembedding
        self.windows = set(spec.windows)
        self.device = embedding.device
        self.dtype = embedding.dtype
        # How products take them.
        self.activations = self.dtype
        self.compiled = _compiled_blocks(self) if self.batch_invariant else None

    def round_activations(self) -> None:
        """Lets the products of the blocks and of the unembedding take activations in 8 bits (cpu/integers/).

        Raises ValueError where no weights are codes or the decoder is not `batch_invariant`: nothing would be rounded.
        """
        products = [self.unembedding, *(getattr(block, name) for block in self.blocks for name in _PRODUCTS)]
        rounded = [linear.round_inputs() for linear in products] if self.batch_invariant else []
        if not any(rounded):
            raise ValueError(
                "--activations int8 takes weights in formats of codes (Q8_0, Q4_K, ...) with --dtype float32, "
                "--device cpu and --batch-invariant on"
            )
        self.activations = torch.int8
        self.compiled = _compiled_blocks(self)

    def warm_up(self) -> None:
        """Compiles what is compiled at run time, so that no request waits for it: one token goes through block 0."""
        pool = self.pool(2, 1)
        first = torch.zeros(1, dtype=torch.int64, device=self.device)
        batch = AttentionBatch([Span(0, 1, 0, [1])], 1, self.windows, self.device)
        x = self.embed(first, first)
        self.logits(self.run_blocks(x, range(1), StepInputs(first, first, first + 1, batch), [pool]))
        if operators.holds_for(x):
            operators.warm_up()

    @property
    def reads_tiles(self) -> bool:
        """Whether its pools are tiled: compiled code reads them on a CPU in float32."""
        return self.device.type == "cpu" and self.dtype == torch.float32

    def pool(self, n_blocks: int, block_size: int) -> Pool:
        """Returns an empty pool of one layer, in the dtype of the model."""
        shape = n_blocks, block_size, self.spec.n_kv_heads, self.spec.head_dim
        return TiledPool(*shape) if self.reads_tiles else KvPool(*shape, self.dtype, self.device)

    @torch.inference_mode()
    def forward(
        self,
        step: StepInputs,
        pools: Sequence[Pool],
        hooks: SiteHooks = NO_HOOKS,
        products: Sequence[BlockProducts] | None = None,
    ) -> Tensor:
        """Returns the residual stream [T, d_model] at the end of the last block; writes the KV pools."""
        x = self.embed(step.token_ids, step.positions)
        return self.run_blocks(x, range(self.spec.n_layers), step, pools, hooks, products)

    def embed(self, token_ids: Tensor, positions: Tensor | None = None) -> Tensor:
        """Returns the start of the residual stream [T, d_model]; without positions, what the tokens alone give."""
        x = self.embedding.rows(token_ids)
        if self.spec.embedding_scale != 1.0:
            x = x * torch.tensor(self.spec.embedding_scale, dtype=x.dtype)
        if positions is not None and self.position_embedding is not None:
            x = x + F.embedding(positions, self.position_embedding)
        return x

    def run_blocks(
        self,
        x: Tensor,
        layers: range,
        step: StepInputs,
        pools: Sequence[Pool],
        hooks: SiteHooks = NO_HOOKS,
        products: Sequence[BlockProducts] | None = None,
    ) -> Tensor:
        """Returns the residual stream [T, d_model] after the blocks `layers`, from x [T, d_model] before the first.

        `pools` has one pool for each of these layers, which is written. `products` has one entry for each layer of the
        decoder; without it the products are dense. Hooks edit x in place. Where x is differentiated, torch's operators
        compute what compiled loops do otherwise, and `products` must have gradients (analysis/neurons/products.py).
        """
        spec = self.spec
        if self.compiled is not None and products is None and hooks.visited is not None and not x.requires_grad:
            return self.compiled.run(x, layers, step, pools, hooks)
        assert step.sparse is None
        tables = {
            kind: (cos.index_select(0, step.positions), sin.index_select(0, step.positions))
            for kind, (cos, sin) in self.rotary.items()
        }
        for layer, pool in zip(layers, pools, strict=True):
            block = self.blocks[layer]
            own: BlockProducts = block if products is None else products[layer]
            hooks.visit(Site.RESID_PRE, layer, x)
            rotary = tables.get(spec.rotary_kinds[layer])
            z = self._attention(layer, block.attn_norm(x), step, pool, rotary, hooks, own)
            attn_out = self.attention_output(layer, z, own)
            hooks.visit(Site.ATTN_OUT, layer, attn_out)
            visits = step.visited_preactivations
            visited = {site: visits[site, layer] for site in PREACTIVATION_SITES if (site, layer) in visits}
            if spec.parallel_residual:
                mlp_out = self.mlp(layer, block.mlp_norm(x), hooks, own, visited=visited)
                x = x + attn_out
            else:
                x = x + attn_out
                hooks.visit(Site.RESID_MID, layer, x)
                mlp_out = self.mlp(layer, block.mlp_norm(x), hooks, own, visited=visited)
            hooks.visit(Site.MLP_OUT, layer, mlp_out)
            x = x + mlp_out
            hooks.visit(Site.RESID_POST, layer, x)
        return x

    @torch.inference_mode()
    def logits(self, x: Tensor, *, rounded: bool = False) -> Tensor:
        """Unembeds residual states [N, d_model] and returns logits [N, vocab], float32. `rounded`: of states in 8 bits,
        where CompiledBlocks.round_unembedding prepared that."""
        if self.compiled is None:
            return self.unembed(self.final_norm(x))
        return cap_softly(self.compiled.logits(x, rounded=rounded), self.spec.final_soft_cap)

    @torch.inference_mode()
    def unembed(self, h: Tensor) -> Tensor:
        """Returns the logits of residual states after the final norm."""
        logits = self.unembedding(h).float() if self.compiled is None else self.compiled.unembed(h)
        return cap_softly(logits, self.spec.final_soft_cap)

    def _attention(
        self,
        layer: int,
        h: Tensor,
        step: StepInputs,
        pool: Pool,
        rotary: tuple[Tensor, Tensor] | None,
        hooks: SiteHooks,
        products: BlockProducts,
    ) -> Tensor:
        """Returns z [T, n_heads * head_dim] for h, which is the input of attention after its norm."""
        spec = self.spec
        qkv = products.qkv(h).view(h.shape[0], spec.n_heads + 2 * spec.n_kv_heads, spec.head_dim)
        q, k, v = finish_heads(qkv, spec.n_heads, spec.n_kv_heads, self.blocks[layer].head_norms, rotary)
        if layer in step.visited_queries:
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
        return z

    def attention_output(self, layer: int, z: Tensor, products: BlockProducts | None = None) -> Tensor:
        """Returns what attention adds to the residual stream, given z [T, n_heads * head_dim]."""
        block = self.blocks[layer]
        out = (block if products is None else products).attn_output(z)
        return out if block.post_attn_norm is None else block.post_attn_norm(out)

    def mlp(
        self,
        layer: int,
        h: Tensor,
        hooks: SiteHooks = NO_HOOKS,
        products: BlockProducts | None = None,
        *,
        visited: Mapping[Site, bool] | None = None,
    ) -> Tensor:
        """Returns what the MLP adds to the residual stream, given h [T, d_model] after the norm before it.

        `visited`: those of Site.MLP_GATE and Site.MLP_UP that hooks see, and whether in copies of their own, as in
        StepInputs. A row that no hook edits keeps its bits.
        """
        spec, block = self.spec, self.blocks[layer]
        own: BlockProducts = block if products is None else products
        hidden = own.mlp_input(h)
        if visited:
            hidden = self.visit_preactivations(layer, hidden, hooks, visited)
        neurons = neurons_of(hidden, spec.activation, gated=spec.family.gated)
        hooks.visit(Site.MLP_POST, layer, neurons)
        out = own.mlp_output(neurons)
        return out if block.post_mlp_norm is None else block.post_mlp_norm(out)

    def visit_preactivations(
        self, layer: int, hidden: Tensor, hooks: SiteHooks, visited: Mapping[Site, bool]
    ) -> Tensor:
        """Returns what the input projection gave, [T, d_ff] or [T, 2 d_ff] with the gates first, as hooks left it."""
        if not self.spec.family.gated:
            hooks.visit(Site.MLP_UP, layer, hidden)
            return hidden
        parts = [hidden[:, : self.spec.d_ff], hidden[:, self.spec.d_ff :]]
        for i, site in enumerate(PREACTIVATION_SITES):
            if not visited.get(site, False):
                if site in visited:
                    hooks.visit(site, layer, parts[i])
                continue
            own = parts[i].contiguous()
            hooks.visit(site, layer, own)
            if torch.is_grad_enabled():
                parts[i] = own
            else:
                parts[i].copy_(own)
        # Where gradients flow they do so through the copies.
        return torch.cat(parts, dim=1) if torch.is_grad_enabled() else hidden


_PRODUCTS = ("qkv", "attn_output", "mlp_input", "mlp_output")


def _compiled_blocks(decoder: Decoder) -> "CompiledBlocks | None":
    # numba compiles them, and only they need numba.
    from patchclamp_server.model.compiled.blocks import CompiledBlocks, can_compile

    return CompiledBlocks(decoder) if can_compile(decoder) else None
