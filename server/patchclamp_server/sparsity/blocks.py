"""These products of the blocks follow sparse policies: every row of a step its own, in one batch.

`sparse_blocks` gives them to Decoder.run_blocks and to the kernels; a `Step` tells them to whom the rows belong.
Neurons, forced ones included, are selected from x after the residual edits; the neurons that were not selected are 0
before the edits of neurons, and add nothing.

This amounts to a dense product and a mask, and many rows are computed so. For few rows, where there are products for it
(products.py), the weights of inactive neurons are not read. TEAL and WINA, which thin out the inputs of all products,
read only the output projection sparsely: for the others a transposed copy of the model would be needed.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from patchclamp_server.cpu.sparse.glanced_mlp import GlancedMlp
from patchclamp_server.model.decoder import Block
from patchclamp_server.sparsity.apply import Rows, Step
from patchclamp_server.sparsity.mlp import MlpInput, SparseModel
from patchclamp_server.sparsity.policy import FixedSet, Selection, Selector
from patchclamp_server.sparsity.products import Chosen, SparseProducts


def sparse_blocks(
    model: SparseModel, step: Step, gathered: Sequence[SparseProducts] | None = None
) -> list["SparseBlock"]:
    """Returns the products of all blocks, which follow `step`.

    `gathered` has, for each layer, the products that read active neurons only; without it inactive ones are masked.
    """
    return [
        SparseBlock(block, model, layer, step, None if gathered is None else gathered[layer])
        for layer, block in enumerate(model.decoder.blocks)
    ]


@dataclass(eq=False)
class SparseBlock:
    """Replaces the dense products of one `Block` by those under the policies of a step."""

    block: Block
    model: SparseModel
    layer: int
    step: Step
    gathered: SparseProducts | None
    # These pass from the input of the MLP to its output: what was selected, and what replaces the other neurons.
    chosen: list[Chosen] = field(default_factory=list)
    remainders: list[tuple[slice | Tensor, Tensor]] = field(default_factory=list)

    def qkv(self, h: Tensor) -> Tensor:
        return self.block.qkv(masked(h, self._channels("qkv", h)))

    def attn_output(self, z: Tensor) -> Tensor:
        return self.block.attn_output(masked(z, self._channels("attn_output", z)))

    def mlp_input(self, x: Tensor) -> Tensor:
        x = masked(x, self._channels("mlp_input", x))
        parts = self.step.sparse(self.layer)
        if not self._gathers(parts):
            hidden = self.block.mlp_input(x)
            for part, mlp in self._glanced(parts):
                hidden[part.rows] = mlp.input(x[part.rows].contiguous())
            self._choose(parts, x, hidden)
            return hidden
        self._choose(parts, x, None)
        if not self.chosen:
            return self.block.mlp_input(x)
        assert self.gathered is not None
        width = self.model.spec.d_ff * (2 if self.model.spec.family.gated else 1)
        return _by_groups(x, self.chosen, width, self.gathered.inputs, self.block.mlp_input)

    def mlp_output(self, neurons: Tensor) -> Tensor:
        for part in self.step.prompts:
            part.selector.observe_prompt(part.state, self.layer, neurons[part.rows])
        chosen = self.chosen + self._channels("mlp_output", neurons)
        if not chosen:
            return self.block.mlp_output(neurons)
        if self._gathers(self.step.sparse(self.layer)):
            assert self.gathered is not None
            width = self.model.spec.d_model
            y = _by_groups(neurons, chosen, width, self.gathered.outputs, self.block.mlp_output)
        else:
            kept = masked(neurons, chosen)
            y = self.block.mlp_output(kept)
            for part, mlp in self._glanced(self.step.sparse(self.layer)):
                y[part.rows] = mlp.output(kept[part.rows].contiguous())
        for rows, remainder in self.remainders:
            y[rows] += remainder
        return y

    def _channels(self, projection: str, x: Tensor) -> list[Chosen]:
        """Returns which inputs x [T, width] of a projection are read, for rows whose policy thins them out."""
        found = []
        for part in self.step.thinned(self.layer):
            mask = part.selector.channels(self.layer, projection, x[part.rows])
            if mask is None:
                continue
            if projection == "mlp_output":
                mask = part.with_forced(self.layer, mask)
            self.step.count(part, self.layer, projection, torch.count_nonzero(mask), (mask.shape[0], mask.shape[1]))
            found.append(Chosen(part.rows, mask))
        return found

    def _gathers(self, parts: Sequence[Rows]) -> bool:
        rows = sum(part.rows.stop - part.rows.start for part in parts)
        return self.gathered is not None and rows <= self.gathered.most_rows and not self._glanced(parts)

    def _glanced(self, parts: Sequence[Rows]) -> list[tuple[Rows, GlancedMlp]]:
        """Returns those of `parts` whose policies have an MLP of their own, with it."""
        return [(part, own[self.layer]) for part in parts if (own := part.selector.glanced) is not None]

    def _choose(self, parts: Sequence[Rows], x: Tensor, hidden: Tensor | None) -> None:
        """Selects for the rows of `parts`, for all of one policy at once where its sets do not stay for a sequence.

        `hidden` is what the input projection gives, where it has been computed for all rows.
        """
        self.chosen, self.remainders = [], []
        together: dict[Selector, list[Rows]] = {}
        for part in parts:
            fixed = self._fixed(part)
            if fixed is None:
                together.setdefault(part.selector, []).append(part)
                continue
            n = part.rows.stop - part.rows.start
            self.step.count(part, self.layer, "neurons", n * len(fixed.index), (n, len(fixed.mask)))
            self.chosen.append(Chosen(part.rows, fixed.mask.expand(n, -1), fixed))
        for selector, own in together.items():
            rows = own[0].rows if len(own) == 1 else _rows_of(own, x.device)
            mlp = self._input(x[rows], None if hidden is None else hidden[rows])
            selection = selector.select(own[0].state, self.layer, mlp)
            if selection is not None:
                self._take(own, rows, selection, mlp.known_gate)

    def _take(self, parts: Sequence[Rows], rows: slice | Tensor, selection: Selection, gate: Tensor | None) -> None:
        actives, start = [], 0
        for part in parts:
            n = part.rows.stop - part.rows.start
            active = part.with_forced(self.layer, selection.active[start : start + n])
            self.step.count(part, self.layer, "neurons", torch.count_nonzero(active), (n, active.shape[1]))
            actives.append(active)
            start += n
        active = actives[0] if len(actives) == 1 else torch.cat(actives)
        self.chosen.append(Chosen(rows, active, gate=gate))
        if selection.remainder is not None:
            self.remainders.append((rows, selection.remainder(active)))

    def _fixed(self, part: Rows) -> FixedSet | None:
        state, layer = part.state, self.layer
        if layer not in state.fixed:
            mask = part.selector.fixed_set(state, layer)
            if mask is None:
                return None
            mask = part.with_forced(layer, mask)
            state.fixed[layer] = FixedSet(mask, mask.nonzero()[:, 0])
        return state.fixed[layer]

    def _input(self, x: Tensor, hidden: Tensor | None) -> MlpInput:
        weights = self.model.layers[self.layer]
        if hidden is None:
            product = None if self.gathered is None or weights.gate is None else self.gathered.gate
            return MlpInput(x, weights, gate_product=product)
        return MlpInput(x, weights, hidden=hidden)


def _by_groups(
    x: Tensor,
    chosen: Sequence[Chosen],
    width: int,
    product: Callable[[Tensor, Chosen], Tensor],
    dense: Callable[[Tensor], Tensor],
) -> Tensor:
    """Returns a product [T, width]: by `product` where something was chosen, by `dense` for the other rows."""
    if len(chosen[0].active) == len(x):
        return product(x, chosen[0])
    out = x.new_empty(len(x), width)
    others = torch.ones(len(x), dtype=torch.bool, device=x.device)
    for group in chosen:
        out[group.rows] = product(x[group.rows], group)
        others[group.rows] = False
    rows = others.nonzero()[:, 0]
    if len(rows):
        out[rows] = dense(x[rows])
    return out


def masked(x: Tensor, chosen: Sequence[Chosen]) -> Tensor:
    """Returns x [T, width] with zeros where a row does not read it."""
    if not chosen:
        return x
    x = x.clone()
    for group in chosen:
        x[group.rows] = x[group.rows].masked_fill(~group.active, 0.0)
    return x


def _rows_of(parts: Sequence[Rows], device: torch.device) -> Tensor:
    return torch.cat([torch.arange(part.rows.start, part.rows.stop, device=device) for part in parts])
