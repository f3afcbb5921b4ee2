"""The MLP that policies select from: its weights by neuron, and its input, of which a selector computes what it needs.

gated    h_j = act(x · gate_j + b) (x · up_j + b)         ungated    h_j = act(x · up_j + b)
y = Σ_j h_j down_j + b
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from patchclamp_server.cpu.activations import ACTIVATION_FUNCTIONS
from patchclamp_server.cpu.linear import Linear
from patchclamp_server.cpu.quantized import GROUP
from patchclamp_server.model.decoder import Block, Decoder
from patchclamp_server.model.spec import DecoderSpec


@dataclass(frozen=True, eq=False)
class MlpWeights:
    """gate and up [d_ff, d], down [d_ff, d] (one row a neuron); gate is None where the MLP is not gated."""

    activation: Callable[[Tensor], Tensor]
    gate: Tensor | None
    up: Tensor
    down: Tensor
    gate_bias: Tensor | None = None
    up_bias: Tensor | None = None

    @property
    def d_ff(self) -> int:
        return self.up.shape[0]

    @property
    def matrices(self) -> int:
        """Equal matrices in it: what one vector of every neuron is a share of."""
        return 2 if self.gate is None else 3

    @cached_property
    def down_norm(self) -> Tensor:
        """‖down_j‖ [d_ff], float32."""
        norms: Tensor = torch.linalg.vector_norm(self.down, dim=1, dtype=torch.float32)
        return norms


@dataclass(frozen=True, eq=False)
class SparseModel:
    """What policies need of a model. `layers` are materialised when first asked for.

    `derived`: what policies made of the weights (norms, sketches), shared by all that are bound to this model.
    """

    fingerprint: str
    decoder: Decoder
    derived: dict[str, Any] = field(default_factory=dict)

    @property
    def spec(self) -> DecoderSpec:
        return self.decoder.spec

    @property
    def n_layers(self) -> int:
        return len(self.decoder.blocks)

    @cached_property
    def layers(self) -> tuple[MlpWeights, ...]:
        return tuple(mlp_weights(block, self.decoder.spec) for block in self.decoder.blocks)


class MlpInput:
    """Rows x [n, d] at an MLP. `gate` and `up` are computed when a selector asks, and `read` tells that it did."""

    def __init__(
        self,
        x: Tensor,
        weights: MlpWeights,
        *,
        gate: Tensor | None = None,
        up: Tensor | None = None,
        gate_product: Callable[[Tensor], Tensor] | None = None,
    ) -> None:
        """`gate`, `up`: the pre-activations, where they are known already. `gate_product`: how gates are computed."""
        self.x = x
        self.weights = weights
        self.read: set[str] = set()
        self._gate = gate
        self._up = up
        self._gate_product = gate_product

    @property
    def known_gate(self) -> Tensor | None:
        """Pre-activations of all gates [n, d_ff], if they have been computed."""
        return self._gate

    @property
    def rows(self) -> int:
        return self.x.shape[0]

    @property
    def gate(self) -> Tensor:
        """Pre-activations [n, d_ff] of what the activation function is applied to: of up in an MLP without a gate."""
        weights = self.weights
        if weights.gate is None:
            return self.up
        self.read.add("gate")
        if self._gate is None and self._gate_product is not None:
            self._gate = self._gate_product(self.x)
        elif self._gate is None:
            self._gate = _affine(self.x, weights.gate, weights.gate_bias)
        return self._gate

    @property
    def up(self) -> Tensor:
        self.read.add("up")
        if self._up is None:
            self._up = _affine(self.x, self.weights.up, self.weights.up_bias)
        return self._up

    @property
    def activated(self) -> Tensor:
        """act(gate) [n, d_ff]."""
        return self.weights.activation(self.gate)

    @property
    def neurons(self) -> Tensor:
        """h [n, d_ff]: everything but down was read."""
        return self.activated if self.weights.gate is None else self.activated * self.up


def mlp_weights(block: Block, spec: DecoderSpec) -> MlpWeights:
    """The MLP of a block, out of whatever layout its products use."""
    fused, bias = matrix(block.mlp_input), block.mlp_input.bias
    activation = ACTIVATION_FUNCTIONS[spec.activation]
    down = matrix(block.mlp_output).t().contiguous()
    if not spec.family.gated:
        return MlpWeights(activation, None, fused, down, up_bias=bias)
    gate, up = fused.view(2, spec.d_ff, -1).unbind(0)
    gate_bias, up_bias = (None, None) if bias is None else bias.view(2, -1).unbind(0)
    return MlpWeights(activation, gate, up, down, gate_bias, up_bias)


@torch.inference_mode()
def matrix(linear: Linear) -> Tensor:
    """W [out, in]. Where only codes or packed weights are kept, its products with unit vectors, which are exact."""
    if linear.weight is not None:
        return linear.weight
    assert linear.quantized is not None
    width = linear.quantized.codes.shape[1] * GROUP
    rows = linear(torch.eye(width))
    return (rows if linear.bias is None else rows - linear.bias).t().contiguous()


def _affine(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return torch.nn.functional.linear(x, weight, bias)
