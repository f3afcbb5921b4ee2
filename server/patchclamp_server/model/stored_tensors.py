"""What the headers of files say of their tensors: names, formats and shapes. No weight is read."""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from patchclamp_server.cpu.stored import Format
from patchclamp_server.model.digests import tensor_shapes

if TYPE_CHECKING:
    from gguf import GGUFReader

# Double precision is loaded as float32. Tensors of other types are not weights: buffers of masks, and such.
_SAFETENSORS = {"F64": Format.F32, "F32": Format.F32, "F16": Format.F16, "BF16": Format.BF16}


@dataclass(frozen=True)
class StoredTensor:
    """A tensor of a file; the last number of its shape is that of the weights in a row."""

    name: str
    format: Format
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        """Bytes of the weights. Raises ValueError unless its rows are whole blocks."""
        if not self.shape:
            return self.format.size
        return math.prod(self.shape[:-1]) * self.format.row_bytes(self.shape[-1])


def safetensors_tensors(files: Iterable[Path]) -> list[StoredTensor]:
    """Returns the tensors of all files. Raises ModelSourceError where one is not whole."""
    return [
        StoredTensor(name, _SAFETENSORS[dtype], shape)
        for path in files
        for name, (dtype, shape) in tensor_shapes(path).items()
        if dtype in _SAFETENSORS
    ]


def gguf_tensors(headers: Sequence["GGUFReader"]) -> list[StoredTensor]:
    """Returns the tensors of a GGUF file, or of all parts of a split one. Raises ValueError for an unknown format."""
    return [
        StoredTensor(tensor.name, Format(int(tensor.tensor_type)), tuple(int(n) for n in reversed(tensor.shape)))
        for header in headers
        for tensor in header.tensors
    ]
