"""This computes the neurons of an MLP from what its input projection gives.

    gated    h = act(gate) · up         ungated    h = act(z)

Only this module writes the formula on a CPU, with its two backends: compiled loops where they apply
(invariant/operators.py), torch's operators elsewhere. On a GPU the kernel `gated_activation` computes the neurons
together with their edits.
"""

from collections.abc import Callable

import torch.nn.functional as F
from torch import Tensor

from patchclamp_server.cpu.invariant import operators


def gelu_tanh(x: Tensor) -> Tensor:
    return F.gelu(x, approximate="tanh")


# The keys are the names of DecoderSpec.activation.
ACTIVATION_FUNCTIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_tanh": gelu_tanh,
    "relu": F.relu,
}


def neurons_of(hidden: Tensor, activation: str, *, gated: bool) -> Tensor:
    """Returns the neurons [T, d_ff] of the pre-activations `hidden`: [T, d_ff], or [T, 2 d_ff] with the gates first
    where the MLP is gated."""
    if operators.holds_for(hidden):
        return operators.activate(hidden, activation, gated=gated)
    function = ACTIVATION_FUNCTIONS[activation]
    if not gated:
        return function(hidden)
    gate, up = hidden.view(-1, 2, hidden.shape[1] // 2).unbind(1)
    return function(gate) * up
