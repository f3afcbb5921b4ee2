"""The tensors of a model as its files hold them, by the names that transformers gives its parameters.

Nothing is read before it is asked for: a tensor is bytes of a mapped file, its format and its shape. The files of
safetensors (safetensors_files.py), those of GGUF (gguf/tensors.py) and a model in memory are told apart here no more.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from patchclamp_server.cpu.stored import Format, Part
from patchclamp_server.model.stored_tensors import StoredTensor

_FORMATS = {torch.float32: Format.F32, torch.float16: Format.F16, torch.bfloat16: Format.BF16}


@dataclass(frozen=True, eq=False)
class FileTensor:
    """A vector or matrix of one format. `memory` has its bytes, row by row, and no others.

    Row i is row order[i] in `memory`, where there is an order; `shift` is added to what is stored. Where the file has
    another format than `format`, `decode` makes these bytes of those in `memory` when they are first asked for.
    """

    format: Format
    shape: tuple[int, ...]
    memory: NDArray[np.uint8]
    order: NDArray[np.int64] | None = field(default=None)
    shift: float = 0.0
    decode: Callable[[NDArray[np.uint8]], NDArray[np.uint8]] | None = None

    @property
    def nbytes(self) -> int:
        """The bytes of its weights in its format."""
        return math.prod(self.shape[:-1]) * self.format.row_bytes(self.shape[-1]) if self.shape else self.format.size

    @cached_property
    def stored(self) -> NDArray[np.uint8]:
        """The bytes of its weights in its format."""
        return self.memory if self.decode is None else self.decode(self.memory)

    def part(self) -> Part:
        """Returns the rows of a matrix, where they lie."""
        assert len(self.shape) == 2
        assert not self.shift
        part = Part.whole(self.format, self.stored, self.shape[1])
        return part if self.order is None else part.reordered(self.order)

    def transposed(self) -> Part:
        """Returns the rows of the transpose, which are copied in the same format. It must have blocks of one weight."""
        assert self.format.weights == 1
        assert self.order is None
        elements = self.stored.reshape(*self.shape, self.format.size)
        memory = np.ascontiguousarray(elements.transpose(1, 0, 2)).reshape(-1)
        return Part.whole(self.format, memory, self.shape[0])

    def dense(self) -> Tensor:
        """Returns a copy in float32, of its shape."""
        width = self.shape[-1] if self.order is None or len(self.shape) > 1 else 1
        values = Part.whole(self.format, self.stored, width).dense()
        if self.order is not None:
            values = values[self.order]
        dense = torch.from_numpy(values).reshape(self.shape)
        return dense + self.shift if self.shift else dense


@dataclass(frozen=True, eq=False)
class FileTensors:
    """`products_transposed`: matrices of products are [in, out] in families whose modules hold them so (GPT-2)."""

    source: str
    tensors: dict[str, FileTensor]
    products_transposed: bool = True

    def __contains__(self, name: str) -> bool:
        return name in self.tensors

    def __getitem__(self, name: str) -> FileTensor:
        return self.tensors[name]

    def listed(self) -> list[StoredTensor]:
        """Returns what they are, without their weights."""
        return [StoredTensor(name, tensor.format, tensor.shape) for name, tensor in self.tensors.items()]

    def same(self, one: str, other: str) -> bool:
        """Returns whether two tensors are equal, bit by bit."""
        a, b = self.tensors[one], self.tensors[other]
        if a.format != b.format or a.shape != b.shape:
            return False
        return a.memory.ctypes.data == b.memory.ctypes.data or bool(np.array_equal(a.stored, b.stored))


def tensors_of(model: nn.Module) -> FileTensors:
    """Returns the parameters and buffers of a model in memory, without copying those that lie on the CPU."""
    return FileTensors(type(model).__name__, {name: _in_memory(value) for name, value in model.state_dict().items()})


def _in_memory(value: Tensor) -> FileTensor:
    value = value.detach().cpu().contiguous()
    if value.dtype not in _FORMATS:
        value = value.float()
    memory: Any = value.reshape(-1).view(torch.uint8).numpy()
    return FileTensor(_FORMATS[value.dtype], tuple(value.shape), memory)
