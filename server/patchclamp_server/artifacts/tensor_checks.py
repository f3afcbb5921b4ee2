"""Checks of one tensor of an artifact. Refusals name the tensor; their field is "tensors"."""

import torch

from patchclamp_server.errors import InvalidArgument

FLOATS = (torch.float32, torch.float16, torch.bfloat16, torch.float64)


def check_floats(name: str, tensor: torch.Tensor) -> None:
    if tensor.dtype not in FLOATS or tensor.numel() == 0:
        raise InvalidArgument("tensors", f"{name} must be floats [n] with n >= 1, not {describe(tensor)}")
    check_finite(name, tensor)


def check_finite(name: str, tensor: torch.Tensor) -> None:
    if not bool(torch.isfinite(tensor).all()):
        raise InvalidArgument("tensors", f"{name} holds NaN or Inf")
    # Whatever is stored in float64 is computed with in float32.
    if not bool(torch.isfinite(tensor.float()).all()):
        raise InvalidArgument("tensors", f"{name} holds a number beyond the largest float32, 3.4e38")


def describe(tensor: torch.Tensor) -> str:
    return f"{str(tensor.dtype).removeprefix('torch.')} {list(tensor.shape)}"
