"""This checks the tensors of stored watches and references."""

from collections.abc import Mapping

import torch
from torch import Tensor

from patchclamp_server.errors import InvalidArgument


def checked(tensors: Mapping[str, Tensor], name: str, dtype: torch.dtype, shape: list[int | None]) -> Tensor:
    """Returns the tensor if it is finite and has this shape, in which None is any size. Raises InvalidArgument."""
    tensor = tensors.get(name)
    if tensor is None:
        raise InvalidArgument("", f"there is no tensor {name!r}")
    fits = tensor.dim() == len(shape) and all(n in (None, own) for n, own in zip(shape, tensor.shape, strict=True))
    if tensor.dtype != dtype or not fits:
        raise InvalidArgument("", f"{name} must be {dtype} {shape}, is {tensor.dtype} {list(tensor.shape)}")
    if dtype.is_floating_point and not bool(torch.isfinite(tensor).all()):
        raise InvalidArgument("", f"{name} holds NaN or infinite numbers")
    return tensor
