"""This chooses the implementation of an op that runs, and checks arguments for every op.

The Triton kernel runs on CUDA tensors, and on CPU tensors where ``TRITON_INTERPRET=1`` was set before Triton was
imported. Otherwise the torch reference runs, which is the definition of the op.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from patchclamp_kernels.interpreter import allow_bounds_at_run_time

# Triton decides at import which of the two its decorators make.
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
if INTERPRETED:
    allow_bounds_at_run_time()

_reference_only = False


def uses_kernel(x: Tensor) -> bool:
    return not _reference_only and (x.is_cuda or (INTERPRETED and x.device.type == "cpu"))


@contextmanager
def reference_only() -> Iterator[None]:
    """Makes every op of the process run its torch reference meanwhile, to compare an engine against it."""
    global _reference_only
    before = _reference_only
    _reference_only = True
    try:
        yield
    finally:
        _reference_only = before


def check(condition: bool, message: str) -> None:
    """Raises ValueError: arguments are checked before a kernel can read out of bounds."""
    if not condition:
        raise ValueError(message)


def check_tensor(
    name: str,
    x: Tensor,
    *,
    shape: tuple[int | None, ...],
    dtypes: tuple[torch.dtype, ...],
    device: torch.device,
    contiguous: bool = True,
) -> None:
    """Checks a tensor; `shape` has None where any size is taken. ValueError names the argument and what is taken."""
    fits = x.ndim == len(shape) and all(want is None or want == have for want, have in zip(shape, x.shape, strict=True))
    if not fits:
        wanted = ", ".join("*" if n is None else str(n) for n in shape)
        raise ValueError(f"{name} has shape {list(x.shape)}, not [{wanted}]")
    if x.dtype not in dtypes:
        raise ValueError(f"{name} is {x.dtype}, not {' or '.join(str(d) for d in dtypes)}")
    if x.device != device:
        raise ValueError(f"{name} is on {x.device}, not on {device}")
    if contiguous and not x.is_contiguous():
        raise ValueError(f"{name} is not contiguous")


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """Returns the dtype of references: float64 for float64 (the truth of the tests), float32 for the rest."""
    return torch.float64 if dtype == torch.float64 else torch.float32
