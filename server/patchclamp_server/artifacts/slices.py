"""Tensors of a stored artifact by parts: rows of one are read without the others, and without the whole file."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from patchclamp_server.artifacts.formats.safetensors import DTYPES, Header
from patchclamp_server.artifacts.types import ArtifactInfo

_TORCH_DTYPES = {name: dtype for dtype, name in DTYPES.items()}


@dataclass(frozen=True, eq=False)
class TensorSlices:
    """`read_bytes` returns those from one offset to another of the stored file."""

    info: ArtifactInfo
    header: Header
    read_bytes: Callable[[int, int], bytes]

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        return self.header.shapes

    def read(self, name: str, first: int = 0, end: int | None = None) -> Tensor:
        """Returns rows `first` to `end` of a tensor: its first dimension. Default: all."""
        shape, dtype = self.shapes[name], _TORCH_DTYPES[self.header.dtypes[name]]
        end = shape[0] if end is None else end
        if not 0 <= first <= end <= shape[0]:
            raise IndexError(f"rows {first} to {end} of {name}, which has {shape[0]}")
        row_bytes = dtype.itemsize
        for size in shape[1:]:
            row_bytes *= size
        if first == end:
            return torch.empty(0, *shape[1:], dtype=dtype)
        start = self.header.data_start + self.header.offsets[name]
        data = self.read_bytes(start + first * row_bytes, start + end * row_bytes)
        # The bytes are copied into memory that the tensor owns and may write to.
        return torch.frombuffer(bytearray(data), dtype=dtype).view(end - first, *shape[1:])
