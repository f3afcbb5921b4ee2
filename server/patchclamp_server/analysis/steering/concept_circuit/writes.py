"""What neurons and heads write along a direction u of the residual stream, as parts of a contrast of texts.

    neuron j of layer l   c(a_lj) (down_lj · u)              a: activation, down: its row of the output projection
    head h of layer l     c(z_lh) · (O_lhᵀ u)                z: output of the head, O: its part of the output projection

c is the contrast of scenarios.py, over the tokens that stand for a text at the site of the direction. It is linear, and
biases of output projections are the same for all texts, so the parts of all neurons and heads before the site, and that
of the embedding, sum to c(state) · u: nothing is approximated.

A norm g between the projection and the residual stream (gemma) divides each token by the root mean square of what all
neurons, or heads, of the layer write together. That divisor is measured, token by token, and held fixed:

    c(a_lj / rms_l) ((g * down_lj) · u),   rms_l = sqrt(mean((Σ_j a_lj down_lj + bias)²) + ε)

so that parts still sum to what the layer adds. Source: Do LLMs "Feel"? Emotion circuits discovery and control, 2025.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from patchclamp_server.analysis.neurons.weights import NeuronWeights, neuron_directions
from patchclamp_server.cpu.linear import Linear
from patchclamp_server.engine.exclusive import Slice, Sliced
from patchclamp_server.engine.reducers.weighted_means import WeightedMeans
from patchclamp_server.engine.request import Reduction
from patchclamp_server.model.arrays import BoolArray
from patchclamp_server.model.decoder import Decoder
from patchclamp_server.model.row_operators import Norm
from patchclamp_server.model.sites import Site
from patchclamp_server.sparsity.mlp import matrix


@dataclass(frozen=True, eq=False)
class Writers:
    """Layers whose neurons, and whose heads, write to the residual stream before a site."""

    neuron_layers: tuple[int, ...]
    head_layers: tuple[int, ...]

    @classmethod
    def before(cls, site: Site, layer: int) -> "Writers":
        return cls(tuple(range(layer + (site is Site.RESID_POST))), tuple(range(layer + (site is not Site.RESID_PRE))))


@dataclass(frozen=True, eq=False)
class Writes:
    """Parts float64 along a direction: of neurons [n_layers, d_ff] and heads [n_layers, n_heads]; -inf where a layer
    comes after the site."""

    neurons: Tensor
    heads: Tensor


class Contrasts:
    """Takes c of all activations that write to a site, as texts run. `weights` float64 [texts] are those of c."""

    def __init__(self, decoder: Decoder, writers: Writers, chosen: Sequence[BoolArray], weights: Tensor) -> None:
        self._decoder, self._writers = decoder, writers
        own = weights[:, None]
        self._neurons = WeightedMeans(writers.neuron_layers, chosen, own, self._of_neurons)
        self._heads = WeightedMeans(writers.head_layers, chosen, own, self._of_heads)

    def reductions(self, text: int) -> tuple[Reduction, ...]:
        return Reduction(Site.MLP_POST, self._neurons, text), Reduction(Site.ATTN_Z, self._heads, text)

    def writes(self, direction: Tensor) -> Sliced[Writes]:
        """Returns the parts along a direction [d], as work at the engine's exclusive door, once every text has run."""
        spec = self._decoder.spec
        unit = torch.nn.functional.normalize(direction.double(), dim=0)
        neurons = torch.full((spec.n_layers, spec.d_ff), -torch.inf, dtype=torch.float64)
        heads = torch.full((spec.n_layers, spec.n_heads), -torch.inf, dtype=torch.float64)
        for layer, block in enumerate(self._decoder.blocks):
            if layer in self._writers.neuron_layers:
                yield Slice(1)
                down = neuron_directions(block, spec)[NeuronWeights.DOWN].cpu().double()
                neurons[layer] = self._neurons.sums(layer)[0] * (down @ unit)
            if layer in self._writers.head_layers:
                yield Slice(1)
                read = unit if block.post_attn_norm is None else unit * block.post_attn_norm.weight.cpu().double()
                of_units = self._heads.sums(layer)[0] * (read @ matrix(block.attn_output).cpu().double())
                heads[layer] = of_units.view(spec.n_heads, -1).sum(1)
        return Writes(neurons, heads)

    def _of_neurons(self, layer: int, rows: Tensor) -> Tensor:
        block = self._decoder.blocks[layer]
        return _divided(rows, block.mlp_output, block.post_mlp_norm)

    def _of_heads(self, layer: int, rows: Tensor) -> Tensor:
        block = self._decoder.blocks[layer]
        return _divided(rows, block.attn_output, block.post_attn_norm)


def _divided(rows: Tensor, output: Linear, norm: Norm | None) -> Tensor:
    """Returns rows over what the norm after their projection divides it by."""
    if norm is None:
        return rows
    assert norm.bias is None, "a layer norm would subtract a mean as well"
    written = output(rows).double()
    return rows.double() * (written.square().mean(1, keepdim=True) + norm.eps).rsqrt()
