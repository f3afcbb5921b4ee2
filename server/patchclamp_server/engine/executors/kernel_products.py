"""The products of an MLP that read active neurons only, run on patchclamp_kernels."""

from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor

from patchclamp_kernels.sparse_mlp import NeuronSets, sparse_down, sparse_up
from patchclamp_server.sparsity.mlp import MlpWeights, SparseModel, matrix
from patchclamp_server.sparsity.products import Chosen, SparseProducts

# One launch takes so many rows. The sets of more rows are nearly all neurons together: a dense product is as good.
MOST_ROWS = 32


@dataclass(eq=False)
class KernelMlp:
    """Pads sets to all neurons, so that nobody waits for the device to say how large they are. Padding ends at once."""

    fused: Tensor  # [d_ff or 2 d_ff, d_model], gates first
    input_bias: Tensor | None
    output_bias: Tensor | None
    weights: MlpWeights
    most_rows: int = field(default=MOST_ROWS, init=False)

    def gate(self, x: Tensor) -> Tensor:
        assert self.weights.gate is not None
        return F.linear(x, self.weights.gate, self.weights.gate_bias)

    def inputs(self, x: Tensor, chosen: Chosen) -> Tensor:
        fused, d_ff = self.fused, self.weights.d_ff
        index, which = _index(chosen)
        width = len(fused)
        if width == d_ff:
            wanted = index
        elif chosen.gate is not None:
            wanted = torch.where(index >= 0, index + d_ff, -1)
        else:
            wanted = torch.cat((index, torch.where(index >= 0, index + d_ff, -1)), dim=1)
        z = sparse_up(
            x.contiguous(), fused, NeuronSets(wanted, which), activation="none", gated=False, bias=self.input_bias
        )
        hidden = _spread(z, wanted, which, width)
        if chosen.gate is not None and width != d_ff:
            hidden[:, :d_ff] = chosen.gate.masked_fill(~chosen.active, 0.0)
        return hidden

    def outputs(self, neurons: Tensor, chosen: Chosen) -> Tensor:
        index, which = _index(chosen)
        own = index.clamp_min(0).long()[which.long()]
        sets = NeuronSets(index, which)
        return sparse_down(neurons.gather(1, own), self.weights.down, sets, bias=self.output_bias)


def _index(chosen: Chosen) -> tuple[Tensor, Tensor]:
    """Returns the sets [S, d_ff], active neurons first and in order, then -1, and each row's set (0 for a fixed
    one)."""
    active = chosen.active[:1] if chosen.fixed is not None else chosen.active
    order = torch.argsort(active.int(), dim=1, descending=True, stable=True).int()
    index = torch.where(active.gather(1, order.long()), order, -1)
    rows = len(chosen.active)
    which = torch.zeros(rows, dtype=torch.int32, device=active.device)
    return index, which if chosen.fixed is not None else torch.arange(rows, dtype=torch.int32, device=active.device)


def _spread(z: Tensor, wanted: Tensor, which: Tensor, width: int) -> Tensor:
    """Scatters z [n, K] to the places that the sets name, in zeros [n, width]; a column for padding is cut off."""
    places = torch.where(wanted >= 0, wanted, width).long()[which.long()]
    return z.new_zeros(len(z), width + 1).scatter_(1, places, z)[:, :width].contiguous()


def kernel_products(model: SparseModel) -> list[SparseProducts]:
    blocks = model.decoder.blocks
    return [
        KernelMlp(matrix(block.mlp_input), block.mlp_input.bias, block.mlp_output.bias, weights)
        for block, weights in zip(blocks, model.layers, strict=True)
    ]
