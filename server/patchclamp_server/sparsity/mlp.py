"""Policies select from this MLP: its weights by neuron, and its input, of which a selector computes what it needs.

gated    h_j = act(x · gate_j + b) (x · up_j + b)         ungated    h_j = act(x · up_j + b)
y = Σ_j h_j down_j + b
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from patchclamp_server.cpu.activations import ACTIVATION_FUNCTIONS, neurons_of
from patchclamp_server.cpu.linear import Linear
from patchclamp_server.model.decoder import Block, Decoder
from patchclamp_server.model.spec import DecoderSpec


@dataclass(frozen=True, eq=False)
class MlpWeights:
    """gate, up and down are [d_ff, d], one row for each neuron; gate is None where the MLP is not gated."""

    activation: str  # that of DecoderSpec
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
        """The number of equal matrices in it: one vector of every neuron is one of so many shares."""
        return 2 if self.gate is None else 3

    def activated(self, z: Tensor) -> Tensor:
        """Returns act(z) [n, d_ff], by which policies rank neurons. It is torch's on every device: for few rows that is
        faster than the compiled loops, and a last bit decides nothing."""
        return ACTIVATION_FUNCTIONS[self.activation](z)

    @cached_property
    def down_norm(self) -> Tensor:
        """The norms ‖down_j‖ [d_ff], float32."""
        norms: Tensor = torch.linalg.vector_norm(self.down, dim=1, dtype=torch.float32)
        return norms


@dataclass(frozen=True, eq=False)
class SparseModel:
    """Has what policies need of a model. `layers` are materialised when first asked for: `admit` is told before how
    many bytes that takes, and raises where there are not as many.

    `derived` is what policies made of the weights (norms, sketches), shared by all that are bound to this model.
    """

    fingerprint: str
    decoder: Decoder
    derived: dict[str, Any] = field(default_factory=dict)
    admit: Callable[[int], None] = lambda _: None

    @property
    def spec(self) -> DecoderSpec:
        return self.decoder.spec

    @property
    def n_layers(self) -> int:
        return len(self.decoder.blocks)

    @cached_property
    def layers(self) -> tuple[MlpWeights, ...]:
        numbers = sum(_copied(block, self.spec) for block in self.decoder.blocks)
        self.admit(numbers * self.decoder.dtype.itemsize)
        return tuple(mlp_weights(block, self.decoder.spec) for block in self.decoder.blocks)


class MlpInput:
    """Has rows x [n, d] at an MLP. `gate` and `up` are computed when a selector asks, and `read` tells that it did."""

    def __init__(
        self,
        x: Tensor,
        weights: MlpWeights,
        *,
        hidden: Tensor | None = None,
        gate_product: Callable[[Tensor], Tensor] | None = None,
    ) -> None:
        """`hidden` is what the input projection gives for x, where it is known already. `gate_product` computes gates
        where it is not."""
        self.x = x
        self.weights = weights
        self.read: set[str] = set()
        self._hidden = hidden
        self._gate: Tensor | None = None
        self._up: Tensor | None = None
        self._gate_product = gate_product
        if hidden is not None and weights.gate is None:
            self._up = hidden
        elif hidden is not None:
            self._gate, self._up = hidden.view(-1, 2, weights.d_ff).unbind(1)

    @property
    def known_gate(self) -> Tensor | None:
        """The pre-activations of all gates [n, d_ff], if they have been computed."""
        return self._gate

    @property
    def rows(self) -> int:
        return self.x.shape[0]

    @property
    def gate(self) -> Tensor:
        """The pre-activations [n, d_ff] that the activation function takes: those of up in an MLP without a gate."""
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
        """The activations act(gate) [n, d_ff]."""
        return self.weights.activated(self.gate)

    @property
    def neurons(self) -> Tensor:
        """The neurons h [n, d_ff], as the decoder computes them: everything but down was read."""
        gated, gate, up = self.weights.gate is not None, self.gate, self.up
        hidden = self._hidden
        if hidden is None:
            hidden = torch.cat((gate, up), dim=1) if gated else up
        return neurons_of(hidden, self.weights.activation, gated=gated)


def mlp_weights(block: Block, spec: DecoderSpec) -> MlpWeights:
    """Returns the MLP of a block, whatever layout its products use."""
    fused, bias = block.mlp_input.dense(), block.mlp_input.bias
    down = block.mlp_output.dense().t().contiguous()
    if not spec.family.gated:
        return MlpWeights(spec.activation, None, fused, down, up_bias=bias)
    gate, up = fused.view(2, spec.d_ff, -1).unbind(0)
    gate_bias, up_bias = (None, None) if bias is None else bias.view(2, -1).unbind(0)
    return MlpWeights(spec.activation, gate, up, down, gate_bias, up_bias)


def _copied(block: Block, spec: DecoderSpec) -> int:
    """Returns how many weights `mlp_weights` copies: down is laid out anew, and what is stored becomes dense."""
    stored = block.mlp_input.weight is None
    return spec.d_ff * spec.d_model * (1 + stored * (2 if spec.family.gated else 1))


def matrix(linear: Linear) -> Tensor:
    """Returns W [out, in], a copy where weights are stored."""
    return linear.dense()


def _affine(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return torch.nn.functional.linear(x, weight, bias)
