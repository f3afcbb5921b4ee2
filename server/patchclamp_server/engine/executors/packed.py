"""Puts many small arrays into one buffer, so that a step copies to the device once."""

from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor

# Kernels load 16 bytes at a time, and are compiled anew for a pointer that is aligned differently.
_ALIGNMENT = 16
_TORCH = {np.dtype(np.int64): torch.int64, np.dtype(np.int32): torch.int32}

Layout = Mapping[str, tuple[tuple[int, ...], np.dtype]]


class Packed:
    """A buffer with host and device views by name. On a CPU both are the same memory."""

    def __init__(self, layout: Layout, device: torch.device, *, pinned: bool = False) -> None:
        offsets, size = {}, 0
        for name, (shape, dtype) in layout.items():
            offsets[name] = size
            n = int(np.prod(shape)) * dtype.itemsize
            size += -(-n // _ALIGNMENT) * _ALIGNMENT
        # The buffer is made as int64, so that the memory is aligned for every view.
        self._staging = torch.zeros(size // 8, dtype=torch.int64, pin_memory=pinned).view(torch.uint8)
        self._memory = self._staging if device.type == "cpu" else torch.zeros(size, dtype=torch.uint8, device=device)
        self.host: dict[str, np.ndarray] = {}
        self.device: dict[str, Tensor] = {}
        staging = self._staging.numpy()
        for name, (shape, dtype) in layout.items():
            part = slice(offsets[name], offsets[name] + int(np.prod(shape)) * dtype.itemsize)
            self.host[name] = staging[part].view(dtype).reshape(shape)
            self.device[name] = self._memory[part].view(_TORCH[dtype]).view(shape)

    def upload(self) -> None:
        if self._memory is not self._staging:
            self._memory.copy_(self._staging, non_blocking=True)


def packed(arrays: Mapping[str, np.ndarray], device: torch.device) -> dict[str, Tensor]:
    """Returns the arrays on the device."""
    buffer = Packed({name: (a.shape, a.dtype) for name, a in arrays.items()}, device)
    for name, values in arrays.items():
        buffer.host[name][...] = values
    buffer.upload()
    return buffer.device
