"""The forward pass on patchclamp_kernels has the same sites as Decoder.forward and makes fewer passes over memory.

    launch of a residual boundary:  x ← edits(x + edits(out));  h ← norm(x)

One launch takes what a block adds, its edits, the edits of the residual stream up to the next norm, and that norm. The
programs of a step only change the tables that the launch reads, so that a captured graph serves any of them.

Since that launch takes the end of one block and the start of the next, and reads tables of edits instead of calling
hooks, this module has its own loop over the blocks and does not use Decoder.run_blocks. Embedding, products,
unembedding and the numbers of a family are the decoder's.
"""

from collections.abc import Sequence, Set
from dataclasses import dataclass, field

import torch
from torch import Tensor

from patchclamp_kernels.gated_activation import NeuronProgram, gated_activation, neuron_receipts, neuron_tiles
from patchclamp_kernels.paged_attention import Attended, RaggedBatch, paged_attention
from patchclamp_kernels.program_table import ProgramRows, ProgramTable
from patchclamp_kernels.residual_edits import NormParams, ProgramStep, edit_rows, residual_edits
from patchclamp_kernels.rope_kv_write import rope_kv_write
from patchclamp_server.model.attention.peaks import Peaks
from patchclamp_server.model.attention.pools import KvPool, Pool
from patchclamp_server.model.decoder import BlockProducts, Decoder, SiteHooks
from patchclamp_server.model.row_operators import Norm
from patchclamp_server.model.sites import FORWARD_ORDER, PREACTIVATION_SITES, Site, place_number


@dataclass(frozen=True, eq=False)
class Programs:
    """The programs of a step. The flags and `breaks`: see KernelPlan."""

    table: ProgramTable
    rows: ProgramRows
    # These are vectors by width.
    banks: dict[int, Tensor]
    head_dim: int
    attn_q: bool = False
    attn_z: bool = False
    neurons: bool = False
    neuron_rows: bool = False
    preactivations: bool = False
    most_neuron_entries: int = 0
    breaks: Set[int] = frozenset()
    observers: SiteHooks | None = None
    _steps: dict[int, ProgramStep] = field(default_factory=dict)

    def step(self, width: int) -> ProgramStep:
        if width not in self._steps:
            heads = self.banks[self.head_dim]
            self._steps[width] = ProgramStep(self.table, self.rows, self.banks[width], heads, self.head_dim)
        return self._steps[width]


@dataclass(frozen=True, eq=False)
class KernelInputs:
    """Rows of one step, single-token rows first. A padding row has KV slot -1 and belongs to an empty sequence."""

    token_ids: Tensor  # [T] int64
    positions: Tensor  # [T] int64
    slots: Tensor  # [T] int64
    attention: RaggedBatch
    programs: Programs
    peaks: Peaks | None = None


@dataclass(frozen=True, eq=False)
class _Delta:
    """Holds what a block adds to the residual stream, at which place, and the norm that it passes first."""

    values: Tensor
    place: int
    norm: Norm | None = None


class KernelForward:
    def __init__(self, decoder: Decoder) -> None:
        self.decoder = decoder
        self._norms: dict[int, NormParams] = {}
        spec = decoder.spec
        self._neuron_tiles = neuron_tiles(spec.d_ff, decoder.device)
        places = [place_number(Site.MLP_POST, layer) for layer in range(spec.n_layers)]
        self._neuron_places = torch.tensor(places, dtype=torch.int32, device=decoder.device)
        own = [site for site in PREACTIVATION_SITES if site in spec.sites]
        self._preactivation_places = [[place_number(site, layer) for site in own] for layer in range(spec.n_layers)]

    @torch.inference_mode()
    def __call__(
        self, step: KernelInputs, pools: Sequence[Pool], products: Sequence[BlockProducts] | None = None
    ) -> tuple[Tensor, Tensor]:
        """Returns the residual stream at the end and its final norm, both [T, d_model]; writes the KV pools.

        `products` is as in Decoder.run_blocks.
        """
        decoder, spec = self.decoder, self.decoder.spec
        x = decoder.embed(step.token_ids, step.positions)
        blocks = decoder.blocks
        partial = self._receipt_parts(step)
        h = self._boundary(step, x, None, (0, 1), blocks[0].attn_norm)
        assert h is not None
        for layer, block in enumerate(blocks):
            own: BlockProducts = block if products is None else products[layer]
            attn_out = _Delta(
                self._attention(step, own, layer, h, pools[layer]),
                place_number(Site.ATTN_OUT, layer),
                block.post_attn_norm,
            )
            middle = place_number(Site.RESID_MID, layer)
            if spec.parallel_residual:
                # Attention's output is edited now, because the MLP's edits may be gated by it, but is added to the
                # stream only after the MLP.
                self._edit(step, attn_out.values, attn_out.place)
                inner = self._boundary(step, x, None, None, block.mlp_norm)
            else:
                inner = self._boundary(step, x, attn_out, (middle, middle + 1), block.mlp_norm)
            assert inner is not None
            mlp_out = _Delta(
                self._mlp(step, own, layer, inner, partial), place_number(Site.MLP_OUT, layer), block.post_mlp_norm
            )
            if spec.parallel_residual:
                residual_edits(x, delta=attn_out.values)
            last = layer + 1 == len(blocks)
            end = place_number(Site.RESID_POST, layer)
            h = self._boundary(
                step,
                x,
                mlp_out,
                (end, end + 1 if last else end + 2),
                decoder.final_norm if last else blocks[layer + 1].attn_norm,
            )
            assert h is not None
        if partial is not None:
            neuron_receipts(step.programs.table, step.programs.rows, self._neuron_places, partial)
        return x, h

    def _receipt_parts(self, step: KernelInputs) -> Tensor | None:
        """Returns memory in which the activation kernel leaves parts of receipts, for all layers; see NeuronProgram."""
        programs = step.programs
        if not programs.neurons or programs.neuron_rows:
            return None
        shape = (len(self._neuron_places), len(step.token_ids), self._neuron_tiles, programs.most_neuron_entries, 2)
        return torch.empty(shape, dtype=torch.float32, device=self.decoder.device)

    def _boundary(
        self, step: KernelInputs, x: Tensor, delta: _Delta | None, places: tuple[int, int] | None, norm: Norm | None
    ) -> Tensor | None:
        """Sets x ← edits(x + edits(delta)) in place, returns x's norm: one launch unless observers look between."""
        programs = step.programs
        stream = range(*places) if places is not None else range(0)
        crossed = [*stream] if delta is None else [delta.place, *stream]
        if programs.breaks.isdisjoint(crossed):
            return residual_edits(
                x,
                delta=None if delta is None else delta.values,
                delta_norm=None if delta is None else self._params(delta.norm),
                program=programs.step(x.shape[1]),
                delta_places=None if delta is None else (delta.place, delta.place + 1),
                places=places,
                norm=self._params(norm),
            )
        if delta is not None:
            added = delta.values
            if delta.norm is not None:
                normed = residual_edits(added, norm=self._params(delta.norm))
                assert normed is not None
                added = normed
            self._edit(step, added, delta.place)
            residual_edits(x, delta=added)
        for place in stream:
            self._edit(step, x, place)
        return residual_edits(x, norm=self._params(norm))

    def _edit(self, step: KernelInputs, x: Tensor, place: int) -> None:
        """Edits and observes activations at one place, in a launch of its own."""
        programs = step.programs
        edit_rows(x, program=programs.step(x.shape[1]), places=(place, place + 1))
        self._observe(programs, place, x)

    def _attention(self, step: KernelInputs, own: BlockProducts, layer: int, h: Tensor, pool: Pool) -> Tensor:
        assert isinstance(pool, KvPool)
        spec, programs, norms = self.decoder.spec, step.programs, self.decoder.blocks[layer].head_norms
        rotary = self.decoder.rotary.get(spec.rotary_kinds[layer])
        cos, signed_sin = rotary if rotary is not None else (None, None)
        q = rope_kv_write(
            own.qkv(h),
            cos,
            signed_sin,
            step.positions,
            step.slots,
            pool.keys,
            pool.values,
            n_heads=spec.n_heads,
            q_norm=None if norms is None else norms.q.weight,
            k_norm=None if norms is None else norms.k.weight,
            eps=0.0 if norms is None else norms.eps,
        )
        if programs.attn_q:
            place = place_number(Site.ATTN_Q, layer)
            edit_rows(q.view(len(q), -1), program=programs.step(spec.sites[Site.ATTN_Z]), places=(place, place + 1))
        peaks = None if step.peaks is None else step.peaks.at(layer)
        out = None
        if peaks is not None:
            z = torch.empty((len(q), spec.sites[Site.ATTN_Z]), dtype=q.dtype, device=q.device)
            out = Attended(z, peaks.positions, peaks.probabilities, off_sink=peaks.off_sink)
        z = paged_attention(
            q,
            pool.keys,
            pool.values,
            step.attention,
            scale=spec.attention_scale,
            window=spec.windows[layer],
            soft_cap=spec.attention_soft_cap,
            readout=peaks is not None,
            off_sink=peaks is not None and peaks.off_sink is not None,
            out=out,
        ).z
        place = place_number(Site.ATTN_Z, layer)
        if programs.attn_z:
            edit_rows(z, program=programs.step(z.shape[1]), places=(place, place + 1))
        self._observe(programs, place, z)
        return own.attn_output(z)

    def _mlp(self, step: KernelInputs, own: BlockProducts, layer: int, h: Tensor, partial: Tensor | None) -> Tensor:
        """Neurons are edited in the pass that makes them. Gates and ups, which that pass takes together, are edited and
        observed before it in copies of their own, and only where there is anything at them: a row that nothing edits
        keeps its bits."""
        spec, programs = self.decoder.spec, step.programs
        place = place_number(Site.MLP_POST, layer)
        inside = None
        if partial is not None:
            inside = NeuronProgram(programs.table, programs.rows, place, partial[layer])
        hidden = own.mlp_input(h)
        own_places = self._preactivation_places[layer]
        if programs.preactivations or (programs.breaks and not programs.breaks.isdisjoint(own_places)):
            hidden = self._preactivations(programs, layer, hidden)
        neurons = gated_activation(hidden, activation=spec.activation, gated=spec.family.gated, program=inside)
        if programs.neuron_rows:
            edit_rows(neurons, program=programs.step(spec.d_ff), places=(place, place + 1))
        self._observe(programs, place, neurons)
        return own.mlp_output(neurons)

    def _preactivations(self, programs: Programs, layer: int, hidden: Tensor) -> Tensor:
        """hidden [T, d_ff or 2 d_ff] after what is done at Site.MLP_GATE and Site.MLP_UP."""
        gated = self.decoder.spec.family.gated
        parts = [part.contiguous() for part in hidden.chunk(2, dim=1)] if gated else [hidden]
        for place, part in zip(self._preactivation_places[layer], parts, strict=True):
            if programs.preactivations:
                edit_rows(part, program=programs.step(part.shape[1]), places=(place, place + 1))
            self._observe(programs, place, part)
        return torch.cat(parts, dim=1) if gated else hidden

    def _observe(self, programs: Programs, place: int, x: Tensor) -> None:
        if programs.observers is not None and place in programs.breaks:
            layer, site = divmod(place, len(FORWARD_ORDER))
            programs.observers.visit(FORWARD_ORDER[site], layer, x)

    def _params(self, norm: Norm | None) -> NormParams | None:
        if norm is None:
            return None
        if id(norm) not in self._norms:
            self._norms[id(norm)] = NormParams(norm.weight, norm.bias, norm.eps)
        return self._norms[id(norm)]
