"""These are the activation functions of MLPs, as torch has them and as kernels compute them."""

import math

import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

# "none" leaves pre-activations, for who edits or selects before the activation.
ACTIVATIONS = ("silu", "gelu", "gelu_tanh", "relu", "none")
_SQRT_HALF = tl.constexpr(math.sqrt(0.5))
_SQRT_8_PI = tl.constexpr(math.sqrt(8 / math.pi))


def activate_reference(x: Tensor, activation: str) -> Tensor:
    if activation == "silu":
        return F.silu(x)
    if activation == "relu":
        return F.relu(x)
    if activation == "none":
        return x
    return F.gelu(x, approximate="tanh" if activation == "gelu_tanh" else "none")


@triton.jit
def activate(x, ACTIVATION: tl.constexpr):
    """Computes GELU-tanh as x sigmoid(2u), which is x (1 + tanh u) / 2 without its cancellation at negative x."""
    if ACTIVATION == "silu":
        y = x / (1.0 + tl.exp(-x))
    elif ACTIVATION == "gelu":
        y = 0.5 * x * (1.0 + tl.erf(x * _SQRT_HALF))
    elif ACTIVATION == "gelu_tanh":
        y = x / (1.0 + tl.exp(-_SQRT_8_PI * (x + 0.044715 * x * x * x)))
    elif ACTIVATION == "none":
        y = x
    else:
        y = tl.maximum(x, 0.0, propagate_nan=tl.PropagateNan.ALL)
    return y
