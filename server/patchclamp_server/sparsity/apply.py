"""Runs a decoder under policies: every row by its own, in one batch.

`sparse_decoder` gives a decoder whose four products of a block are wrapped; `Step` tells them whose the rows are.
Neurons are selected from x after the residual edits, forced ones with them; the neurons that were not selected are 0
before the edits of neurons, and add nothing.

What that means is a dense product and a mask, and that is how many rows are computed. For a few, where there are
products for it (products.py), the weights of inactive neurons are not read. TEAL and WINA, which thin out the inputs of
all products, read only the output projection sparsely: for the others a transposed copy of the model would be needed.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from patchclamp_server.cpu.linear import Linear
from patchclamp_server.model.decoder import Decoder
from patchclamp_server.sparsity.mlp import MlpInput, SparseModel
from patchclamp_server.sparsity.policy import (
    FixedSet,
    Selection,
    Selector,
    SequenceState,
)
from patchclamp_server.sparsity.products import Chosen, SparseProducts

NO_NEURONS = torch.empty(0, dtype=torch.int64)
# Neurons that are computed whatever the policy says, by layer; None stands for all.
Forced = Mapping[int, Tensor | None]


@dataclass(frozen=True, eq=False)
class Rows:
    """Rows of one sequence in a step: `prompt` ones are dense and observed, others selected by.

    `forced`: clamped or watched, so always active.
    """

    rows: slice
    selector: Selector
    state: SequenceState
    prompt: bool = False
    forced: Forced = field(default_factory=dict)

    def is_dense(self, layer: int) -> bool:
        return self.prompt or self.selector.is_dense(layer) or self.forced.get(layer, NO_NEURONS) is None

    def with_forced(self, layer: int, mask: Tensor) -> Tensor:
        """mask [..., d_ff] with the forced neurons."""
        forced = self.forced.get(layer)
        if forced is None or not len(forced):
            return mask
        mask = mask.clone()
        mask[..., forced] = True
        return mask


class Step:
    """The rows of the step that runs next, and what was active in it: (active, all) neurons or channels, by layer and
    by what was selected from: "neurons", or the projection whose inputs they are.
    """

    def __init__(self, rows: Sequence[Rows] = ()) -> None:
        self.rows = rows
        self.active: dict[tuple[int, str], tuple[int | Tensor, int]] = {}

    @property
    def rows(self) -> Sequence[Rows]:
        return self._rows

    @rows.setter
    def rows(self, rows: Sequence[Rows]) -> None:
        self._rows = rows
        self._sparse: dict[int, list[Rows]] = {}
        self._thinned: dict[int, list[Rows]] = {}
        self.prompts = [part for part in rows if part.prompt]

    def sparse(self, layer: int) -> list[Rows]:
        if layer not in self._sparse:
            self._sparse[layer] = [part for part in self.rows if not part.is_dense(layer)]
        return self._sparse[layer]

    def thinned(self, layer: int) -> list[Rows]:
        """Those of `sparse` whose policies are about channels."""
        if layer not in self._thinned:
            self._thinned[layer] = [part for part in self.sparse(layer) if part.selector.thins_channels]
        return self._thinned[layer]

    def count(self, part: Rows, layer: int, kind: str, active: int | Tensor, of: tuple[int, int]) -> None:
        """`active` of the (n, width) neurons or channels of n rows are computed."""
        rows, width = of
        before, among = self.active.get((layer, kind), (0, 0))
        self.active[layer, kind] = before + active, among + rows * width
        # Of the products of a block, what this is about.
        weight = part.selector.shares.get(kind, 1.0)
        part.state.active = part.state.active + active * (weight / width)
        part.state.selected += weight * rows


def sparse_decoder(model: SparseModel, step: Step, products: Sequence[SparseProducts] | None = None) -> Decoder:
    """A decoder with the weights of the model's own, that follows `step`. `products`: one for each layer."""
    dense = model.decoder
    blocks = []
    for layer, block in enumerate(dense.blocks):
        own = _Layer(model, layer, step, None if products is None else products[layer])
        blocks.append(
            replace(
                block,
                qkv=_Thinned(block.qkv, "qkv", own),
                attn_output=_Thinned(block.attn_output, "attn_output", own),
                mlp_input=_MlpInput(block.mlp_input, own),
                mlp_output=_MlpOutput(block.mlp_output, own),
            )
        )
    return Decoder(
        dense.spec,
        dense.embedding,
        dense.position_embedding,
        dense.rotary,
        blocks,
        dense.final_norm,
        dense.unembedding,
    )


@dataclass(eq=False)
class _Layer:
    """What the products of a layer share. `chosen` and `remainders` go from the input of the MLP to its output."""

    model: SparseModel
    layer: int
    step: Step
    products: SparseProducts | None
    chosen: list[Chosen] = field(default_factory=list)
    remainders: list[tuple[slice | Tensor, Tensor]] = field(default_factory=list)

    def channels(self, projection: str, x: Tensor) -> list[Chosen]:
        """Which inputs x [T, width] of a projection are read, for rows whose policy thins them out."""
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

    def gathers(self, parts: Sequence[Rows]) -> bool:
        rows = sum(part.rows.stop - part.rows.start for part in parts)
        return self.products is not None and rows <= self.products.most_rows

    def choose(self, parts: Sequence[Rows], x: Tensor, hidden: Tensor | None) -> None:
        """Selects for the rows of `parts`: all of one policy at once, where its sets do not stay for a sequence.

        `hidden`: what the input projection gives, where it has been computed for all rows.
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
            product = None if self.products is None or weights.gate is None else self.products.gate
            return MlpInput(x, weights, gate_product=product)
        if weights.gate is None:
            return MlpInput(x, weights, up=hidden)
        gate, up = hidden.view(-1, 2, weights.d_ff).unbind(1)
        return MlpInput(x, weights, gate=gate, up=up)


class _Wrapped(Linear):
    """A product with the interface of the one inside."""

    def __init__(self, inner: Linear, layer: _Layer) -> None:
        self.inner = inner
        self.bias, self.weight = inner.bias, inner.weight
        self.packed, self.quantized = inner.packed, inner.quantized
        self._layer = layer

    def _gathered(
        self, x: Tensor, chosen: Sequence[Chosen], width: int, product: Callable[[Tensor, Chosen], Tensor]
    ) -> Tensor:
        """The product [T, width]: by `product` where something was chosen, dense for the other rows."""
        if len(chosen[0].active) == len(x):
            return product(x, chosen[0])
        out = x.new_empty(len(x), width)
        dense = torch.ones(len(x), dtype=torch.bool, device=x.device)
        for group in chosen:
            out[group.rows] = product(x[group.rows], group)
            dense[group.rows] = False
        rows = dense.nonzero()[:, 0]
        if len(rows):
            out[rows] = self.inner(x[rows])
        return out


class _Thinned(_Wrapped):
    def __init__(self, inner: Linear, projection: str, layer: _Layer) -> None:
        super().__init__(inner, layer)
        self._projection = projection

    def __call__(self, x: Tensor) -> Tensor:
        return self.inner(masked(x, self._layer.channels(self._projection, x)))


class _MlpInput(_Wrapped):
    def __call__(self, x: Tensor) -> Tensor:
        layer = self._layer
        x = masked(x, layer.channels("mlp_input", x))
        parts = layer.step.sparse(layer.layer)
        if not layer.gathers(parts):
            hidden = self.inner(x)
            layer.choose(parts, x, hidden)
            return hidden
        layer.choose(parts, x, None)
        if not layer.chosen:
            return self.inner(x)
        assert layer.products is not None
        width = layer.model.spec.d_ff * (2 if layer.model.spec.family.gated else 1)
        return self._gathered(x, layer.chosen, width, layer.products.inputs)


class _MlpOutput(_Wrapped):
    def __call__(self, neurons: Tensor) -> Tensor:
        layer = self._layer
        for part in layer.step.prompts:
            part.selector.observe_prompt(part.state, layer.layer, neurons[part.rows])
        chosen = layer.chosen + layer.channels("mlp_output", neurons)
        if not chosen:
            return self.inner(neurons)
        if layer.gathers(layer.step.sparse(layer.layer)):
            assert layer.products is not None
            y = self._gathered(neurons, chosen, layer.model.spec.d_model, layer.products.outputs)
        else:
            y = self.inner(masked(neurons, chosen))
        for rows, remainder in layer.remainders:
            y[rows] += remainder
        return y


def masked(x: Tensor, chosen: Sequence[Chosen]) -> Tensor:
    """x [T, width] with zeros where a row does not read it."""
    if not chosen:
        return x
    x = x.clone()
    for group in chosen:
        x[group.rows] = x[group.rows].masked_fill(~group.active, 0.0)
    return x


def _rows_of(parts: Sequence[Rows], device: torch.device) -> Tensor:
    return torch.cat([torch.arange(part.rows.start, part.rows.stop, device=device) for part in parts])


def forced_neurons(*sets: Sequence[int]) -> Tensor:
    """The union of clamped and watched neurons of a layer, as `Rows.forced` takes it."""
    return torch.tensor(sorted(set().union(*sets)), dtype=torch.int64)
