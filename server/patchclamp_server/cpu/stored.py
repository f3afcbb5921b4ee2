"""Weights as a file holds them: rows of blocks in a GGML format, or of floats, read where they lie.

A block has `weights` numbers in `size` bytes: a scale or two for all of them, and a code for each. The layouts are
those of GGML (ggml-common.h of llama.cpp); F32, F16 and BF16 have blocks of one. A matrix [out, in] is made of parts,
each of one format: a file may hold keys in another format than values, and a product of both takes them as one matrix.
The rows of a part may lie in any order, because rotary embeddings of GGUF files pair other dimensions than ours.
"""

from dataclasses import dataclass
from enum import IntEnum

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor


class Format(IntEnum):
    """The formats by their numbers in GGUF files."""

    F32 = 0
    F16 = 1
    Q4_0 = 2
    Q4_1 = 3
    Q5_0 = 6
    Q5_1 = 7
    Q8_0 = 8
    Q2_K = 10
    Q3_K = 11
    Q4_K = 12
    Q5_K = 13
    Q6_K = 14
    BF16 = 30

    @property
    def weights(self) -> int:
        """The weights of a block."""
        return _BLOCKS[self][0]

    @property
    def size(self) -> int:
        """The bytes of a block."""
        return _BLOCKS[self][1]

    def row_bytes(self, width: int) -> int:
        """Returns the bytes of a row of `width` weights. Raises ValueError unless these are whole blocks."""
        blocks, left = divmod(width, self.weights)
        if left:
            raise ValueError(f"a row of {width} weights is not made of blocks of {self.weights}, as {self.name} is")
        return blocks * self.size


_BLOCKS = {
    Format.F32: (1, 4),
    Format.F16: (1, 2),
    Format.BF16: (1, 2),
    Format.Q4_0: (32, 18),
    Format.Q4_1: (32, 20),
    Format.Q5_0: (32, 22),
    Format.Q5_1: (32, 24),
    Format.Q8_0: (32, 34),
    Format.Q2_K: (256, 84),
    Format.Q3_K: (256, 110),
    Format.Q4_K: (256, 144),
    Format.Q5_K: (256, 176),
    Format.Q6_K: (256, 210),
}


@dataclass(frozen=True, eq=False)
class Part:
    """Rows [n, width] of one format: row r begins at byte starts[r] of `memory`, which may be a mapped file."""

    format: Format
    memory: NDArray[np.uint8]  # [bytes]
    starts: NDArray[np.int64]  # [n]
    width: int

    def __post_init__(self) -> None:
        size = self.format.row_bytes(self.width)
        # Compiled code reads without a look at the ends.
        if len(self.starts) and not 0 <= int(self.starts.min()) <= int(self.starts.max()) <= len(self.memory) - size:
            raise ValueError(f"rows of {size} bytes reach out of {len(self.memory)} bytes of memory")

    @classmethod
    def whole(cls, format: Format, memory: NDArray[np.uint8], width: int) -> "Part":
        """The part whose rows lie one after the other in all of `memory`."""
        size = format.row_bytes(width)
        return cls(format, memory, np.arange(len(memory) // size, dtype=np.int64) * size, width)

    def reordered(self, order: NDArray[np.int64]) -> "Part":
        """The rows `order` of these, in that order."""
        return Part(self.format, self.memory, self.starts[order], self.width)

    def dense(self) -> NDArray[np.float32]:
        """Returns a copy of the weights [n, width]."""
        rows = self._rows()
        if self.format is Format.BF16:
            return (rows.view(np.uint16).astype(np.uint32) << 16).view(np.float32)
        if self.format.weights == 1:
            return rows.view(np.float32 if self.format is Format.F32 else np.float16).astype(np.float32, copy=False)
        # Only blocks need this, which machines that serve other models may not have.
        from gguf import GGMLQuantizationType, dequantize

        return np.ascontiguousarray(dequantize(rows, GGMLQuantizationType(self.format)), dtype=np.float32)

    def _rows(self) -> NDArray[np.uint8]:
        """Returns a copy of the stored rows [n, bytes]."""
        size = self.format.row_bytes(self.width)
        first = int(self.starts.min()) if len(self.starts) else 0
        places, off = np.divmod(self.starts - first, size)
        # Indices of rows where that is possible: those of bytes take eight times the bytes of the weights.
        if off.any():
            rows = self.memory[self.starts[:, None] + np.arange(size)]
        else:
            whole = (len(self.memory) - first) // size
            rows = self.memory[first : first + whole * size].reshape(-1, size)[places]
        return np.asarray(rows, dtype=np.uint8)


@dataclass(frozen=True, eq=False)
class StoredMatrix:
    """A matrix [out, in] whose parts lie one above the other."""

    parts: tuple[Part, ...]

    def __post_init__(self) -> None:
        if len({part.width for part in self.parts}) != 1:
            raise ValueError("parts of a matrix have the same width")

    @classmethod
    def of(cls, weight: Tensor) -> "StoredMatrix":
        """The matrix of a tensor [out, in] in float32, float16 or bfloat16, without a copy where its rows lie together.

        Raises KeyError for another dtype.
        """
        format = {torch.float32: Format.F32, torch.float16: Format.F16, torch.bfloat16: Format.BF16}[weight.dtype]
        memory = weight.detach().contiguous().view(-1).view(torch.uint8).numpy()
        return cls((Part.whole(format, memory, weight.shape[1]),))

    def chosen(self, outputs: NDArray[np.int64]) -> "StoredMatrix":
        """The rows of ascending outputs, without a copy of the weights."""
        first, parts = 0, []
        for part in self.parts:
            end = first + len(part.starts)
            start, stop = np.searchsorted(outputs, (first, end))
            if stop > start:
                parts.append(part.reordered(outputs[start:stop] - first))
            first = end
        return StoredMatrix(tuple(parts) or (self.parts[0].reordered(outputs),))

    @property
    def shape(self) -> tuple[int, int]:
        """[out, in]."""
        return sum(len(part.starts) for part in self.parts), self.parts[0].width

    @property
    def nbytes(self) -> int:
        """The bytes of its weights, as they are stored."""
        return sum(len(part.starts) * part.format.row_bytes(part.width) for part in self.parts)

    def dense(self) -> Tensor:
        """Returns the weights [out, in] float32."""
        return torch.from_numpy(np.concatenate([part.dense() for part in self.parts]))
