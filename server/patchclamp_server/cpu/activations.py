"""The activation functions of MLPs, by the names of DecoderSpec.activation."""

from collections.abc import Callable

import torch.nn.functional as F
from torch import Tensor


def gelu_tanh(x: Tensor) -> Tensor:
    return F.gelu(x, approximate="tanh")


ACTIVATION_FUNCTIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_tanh": gelu_tanh,
    "relu": F.relu,
}


# How compiled loops know them (invariant/rows.py, sparse/kernels.py).
CODES = {"silu": 0, "gelu": 1, "gelu_tanh": 2, "relu": 3}
