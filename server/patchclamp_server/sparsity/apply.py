"""Runs a decoder under policies: every row by its own, in one batch. Dense products with masks: this is the meaning of
a policy, for evaluation and for tests, and not how it is made fast.

`sparse_decoder` gives a decoder whose four products of a block are wrapped; `Step` tells them whose the rows are.
Selection sees x after the residual edits; the neurons are masked after the neuron edits, and forced ones stay.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from patchclamp_server.model.decoder import Decoder
from patchclamp_server.model.linear import Linear
from patchclamp_server.sparsity.mlp import MlpInput, SparseModel
from patchclamp_server.sparsity.policy import PROJECTIONS, Selector, SequenceState


@dataclass(frozen=True, eq=False)
class Rows:
    """Rows of one sequence in a step: `prompt` ones are dense and observed, others selected by.

    `forced` (layer → neurons): clamped or watched, so always active.
    """

    rows: slice
    selector: Selector
    state: SequenceState
    prompt: bool = False
    forced: Mapping[int, Tensor] = field(default_factory=dict)


@dataclass(eq=False)
class Step:
    """The rows of the step that runs next, and what was active in it: (active, all) neurons or channels, by layer and
    by what was selected from: "neurons", or the projection whose inputs they are.
    """

    rows: Sequence[Rows] = ()
    active: dict[tuple[int, str], list[int]] = field(default_factory=dict)

    def count(self, layer: int, kind: str, mask: Tensor) -> None:
        counted = self.active.setdefault((layer, kind), [0, 0])
        counted[0] += int(mask.sum())
        counted[1] += mask.numel()


def sparse_decoder(model: SparseModel, step: Step) -> Decoder:
    """A decoder with the weights of the model's own, that follows `step`."""
    dense = model.decoder
    blocks = []
    for layer, block in enumerate(dense.blocks):
        mlp = _Mlp(model, layer, step)
        blocks.append(
            replace(
                block,
                qkv=_Thinned(block.qkv, "qkv", layer, step),
                attn_output=_Thinned(block.attn_output, "attn_output", layer, step),
                mlp_input=_MlpInput(block.mlp_input, mlp),
                mlp_output=_MlpOutput(block.mlp_output, mlp),
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


def thin(x: Tensor, projection: str, layer: int, step: Step) -> Tensor:
    """x [T, width] with zeros in the channels that its rows do not read."""
    assert projection in PROJECTIONS
    thinned = x
    for part in step.rows:
        if part.prompt or part.selector.is_dense(layer):
            continue
        mask = part.selector.channels(layer, projection, x[part.rows])
        if mask is None:
            continue
        if projection == "mlp_output" and layer in part.forced:
            mask = mask.clone()
            mask[:, part.forced[layer]] = True
        if thinned is x:
            thinned = x.clone()
        thinned[part.rows] = x[part.rows] * mask
        step.count(layer, projection, mask)
    return thinned


class _Wrapped(Linear):
    """A product with the interface of the one inside."""

    def __init__(self, inner: Linear) -> None:
        self.inner = inner
        self.bias, self.weight = inner.bias, inner.weight
        self.packed, self.quantized = inner.packed, inner.quantized


class _Thinned(_Wrapped):
    def __init__(self, inner: Linear, projection: str, layer: int, step: Step) -> None:
        super().__init__(inner)
        self._where = (projection, layer, step)

    def __call__(self, x: Tensor) -> Tensor:
        return self.inner(thin(x, *self._where))


@dataclass(eq=False)
class _Mlp:
    """What the output half of an MLP must know of its input half."""

    model: SparseModel
    layer: int
    step: Step
    x: Tensor | None = None
    hidden: Tensor | None = None


class _MlpInput(_Wrapped):
    def __init__(self, inner: Linear, mlp: _Mlp) -> None:
        super().__init__(inner)
        self._mlp = mlp

    def __call__(self, x: Tensor) -> Tensor:
        mlp = self._mlp
        x = thin(x, "mlp_input", mlp.layer, mlp.step)
        mlp.x, mlp.hidden = x, self.inner(x)
        return mlp.hidden


class _MlpOutput(_Wrapped):
    def __init__(self, inner: Linear, mlp: _Mlp) -> None:
        super().__init__(inner)
        self._mlp = mlp

    def __call__(self, neurons: Tensor) -> Tensor:
        mlp, layer = self._mlp, self._mlp.layer
        neurons = thin(neurons, "mlp_output", layer, mlp.step)
        kept, remainders = neurons, []
        for part in mlp.step.rows:
            rows, selector = part.rows, part.selector
            if part.prompt:
                selector.observe_prompt(part.state, layer, neurons[rows])
                continue
            if selector.is_dense(layer):
                continue
            selection = selector.select(part.state, layer, self._input(rows))
            if selection is None:
                continue
            active = selection.active
            if layer in part.forced:
                active = active.clone()
                active[:, part.forced[layer]] = True
            if kept is neurons:
                kept = neurons.clone()
            kept[rows] = neurons[rows].masked_fill(~active, 0.0)
            mlp.step.count(layer, "neurons", active)
            if selection.remainder is not None:
                remainders.append((rows, selection.remainder(active)))
        y = self.inner(kept)
        for rows, remainder in remainders:
            y[rows] += remainder
        return y

    def _input(self, rows: slice) -> MlpInput:
        mlp = self._mlp
        assert mlp.x is not None
        assert mlp.hidden is not None
        weights = mlp.model.layers[mlp.layer]
        hidden = mlp.hidden[rows]
        if weights.gate is None:
            return MlpInput(mlp.x[rows], weights, up=hidden)
        gate, up = hidden.view(-1, 2, weights.d_ff).unbind(1)
        return MlpInput(mlp.x[rows], weights, gate=gate, up=up)


def forced_neurons(*sets: Sequence[int]) -> Tensor:
    """The union of clamped and watched neurons of a layer, as `Rows.forced` takes it."""
    return torch.tensor(sorted(set().union(*sets)), dtype=torch.int64)
