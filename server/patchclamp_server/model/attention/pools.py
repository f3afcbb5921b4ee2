"""Where the keys and values of one layer are: blocks of `size` tokens, in one of two layouts.

`KvPool` is what kernels and torch's operators read: [n_blocks, size, n_kv_heads, head_dim] each, in the dtype of the
model. `TiledPool` is what row_attention.py reads on a CPU: a vector has one channel of 16 keys, or 16 channels of one
value, and its numbers are float32, bfloat16 (to the nearest, ties to even), or codes of 8 bits:

    x = s c,  s = max |x| / 127 of a token and KV head, c = x / s to the nearest integer, ties to even

A token whose keys or values are not finite has a scale that is not, and so has nothing finite.
"""

from functools import cached_property
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

LANES = 16
_LINE = 64
# These are what a tiled pool may hold, and how numpy holds it.
TILED: dict[torch.dtype, Any] = {torch.float32: np.float32, torch.bfloat16: np.int16, torch.int8: np.int8}


class Pool(Protocol):
    """The keys and values of one layer."""

    @property
    def n_blocks(self) -> int: ...
    @property
    def block_size(self) -> int: ...
    @property
    def dtype(self) -> torch.dtype: ...
    def keys_at(self, slots: Tensor) -> Tensor:
        """Returns the keys [n, n_kv_heads, head_dim] of token addresses block * size + offset, in float32 where it is
        tiled."""

    def values_at(self, slots: Tensor) -> Tensor:
        """Returns the values, as `keys_at` does."""

    def rows(self) -> tuple[Tensor, Tensor]:
        """Returns the keys and the values of all token addresses."""

    def kept(self, slots: Tensor) -> list[Tensor]:
        """Returns what is stored at token addresses, for `restore`."""
        ...

    def restore(self, slots: Tensor, kept: list[Tensor]) -> None: ...
    def clear(self, blocks: list[int]) -> None:
        """Sets blocks to zero."""


# By their names, what keys and values may be kept in besides the dtype of the model.
KV_DTYPES = {"bfloat16": torch.bfloat16, "int8": torch.int8}


class KvPool:
    def __init__(
        self, n_blocks: int, size: int, n_kv_heads: int, dim: int, dtype: torch.dtype, device: torch.device
    ) -> None:
        self.keys, self.values = (
            torch.zeros(n_blocks, size, n_kv_heads, dim, dtype=dtype, device=device) for _ in range(2)
        )
        self.n_blocks, self.block_size, self.dtype = n_blocks, size, dtype

    def keys_at(self, slots: Tensor) -> Tensor:
        return self.rows()[0].index_select(0, slots)

    def values_at(self, slots: Tensor) -> Tensor:
        return self.rows()[1].index_select(0, slots)

    def rows(self) -> tuple[Tensor, Tensor]:
        return self.keys.flatten(0, 1), self.values.flatten(0, 1)

    def kept(self, slots: Tensor) -> list[Tensor]:
        slots = slots.to(self.keys.device)
        return [self.keys_at(slots), self.values_at(slots)]

    def restore(self, slots: Tensor, kept: list[Tensor]) -> None:
        for own, values in zip((self.keys, self.values), kept, strict=True):
            own.flatten(0, 1).index_copy_(0, slots.to(own.device), values)

    def clear(self, blocks: list[int]) -> None:
        index = torch.tensor(blocks, dtype=torch.int64, device=self.keys.device)
        self.keys[index] = 0
        self.values[index] = 0


class TiledPool:
    """Has keys [n_blocks, n_kv_heads, size / lanes, head_dim, lanes], of which `lanes` tokens make a tile (16 where 16
    divides the size, else the size), and values [n_blocks, n_kv_heads, size, width], whose width is that of heads up to
    a multiple of 16. The scales of codes are float32 [n_blocks, n_kv_heads, size]."""

    def __init__(self, n_blocks: int, size: int, n_kv_heads: int, dim: int, dtype: torch.dtype = torch.float32) -> None:
        self.n_blocks, self.block_size, self.dtype = n_blocks, size, dtype
        self.n_kv_heads, self.dim = n_kv_heads, dim
        self.lanes = LANES if size % LANES == 0 else size
        self.width = padded(dim)
        blocks = n_blocks, n_kv_heads
        self.keys = _zeros((*blocks, size // self.lanes, dim, self.lanes), TILED[dtype])
        self.values = _zeros((*blocks, size, self.width), TILED[dtype])
        scales = (*blocks, size) if dtype == torch.int8 else (0, 0, 0)
        self.key_scales, self.value_scales = _zeros(scales, np.float32), _zeros(scales, np.float32)

    @property
    def arrays(self) -> tuple[NDArray[Any], NDArray[Any], NDArray[np.float32], NDArray[np.float32]]:
        """Returns keys, values and their scales as flat arrays; bfloat16 as uint16."""
        kind = np.uint16 if self.dtype == torch.bfloat16 else self.keys.dtype
        return (
            self.keys.view(kind).reshape(-1),
            self.values.view(kind).reshape(-1),
            self.key_scales.reshape(-1),
            self.value_scales.reshape(-1),
        )

    @cached_property
    def addresses(self) -> tuple[int, ...]:
        """The addresses of its arrays, for compiled code."""
        return tuple(array.ctypes.data for array in self.arrays)

    def keys_at(self, slots: Tensor) -> Tensor:
        codes, scales, *_ = self._stored(slots.numpy())
        return self._float(codes, scales)

    def values_at(self, slots: Tensor) -> Tensor:
        *_, codes, scales = self._stored(slots.numpy())
        return self._float(codes, scales)

    def rows(self) -> tuple[Tensor, Tensor]:
        every = torch.arange(self.n_blocks * self.block_size)
        return self.keys_at(every), self.values_at(every)

    def _float(self, stored: NDArray[Any], scales: NDArray[np.float32]) -> Tensor:
        if self.dtype == torch.float32:
            return torch.from_numpy(stored)
        if self.dtype == torch.bfloat16:
            return torch.from_numpy(stored).view(torch.bfloat16).float()
        return torch.from_numpy(stored.astype(np.float32) * scales[..., None])

    def kept(self, slots: Tensor) -> list[Tensor]:
        return [torch.from_numpy(part) for part in self._stored(slots.numpy())]

    def restore(self, slots: Tensor, kept: list[Tensor]) -> None:
        block, offset = np.divmod(slots.numpy(), self.block_size)
        keys, key_scales, values, value_scales = (part.numpy() for part in kept)
        self.keys[block, :, offset // self.lanes, :, offset % self.lanes] = keys
        self.values[block, :, offset, : self.dim] = values
        if self.dtype == torch.int8:
            self.key_scales[block, :, offset] = key_scales
            self.value_scales[block, :, offset] = value_scales

    def _stored(self, slots: NDArray[np.int64]) -> list[NDArray[Any]]:
        """Returns keys, their scales, values and their scales, of which the first and third are [n, n_kv_heads, dim]
        and the others [n, n_kv_heads] or empty."""
        block, offset = np.divmod(slots, self.block_size)
        scales = (s[block, :, offset] if s.size else s for s in (self.key_scales, self.value_scales))
        key_scales, value_scales = scales
        return [
            self.keys[block, :, offset // self.lanes, :, offset % self.lanes],
            key_scales,
            np.ascontiguousarray(self.values[block, :, offset, : self.dim]),
            value_scales,
        ]

    def clear(self, blocks: list[int]) -> None:
        for part in (self.keys, self.values, *((self.key_scales, self.value_scales) if self.key_scales.size else ())):
            part[blocks] = 0


def padded(dim: int) -> int:
    """Returns the width that values of a head take."""
    return -(-dim // LANES) * LANES


def token_bytes(n_layers: int, n_kv_heads: int, dim: int, dtype: torch.dtype, *, tiled: bool) -> int:
    """Returns the bytes of the keys and values of one token, with the scales of codes."""
    numbers = (dim + padded(dim) if tiled else 2 * dim) * dtype.itemsize
    return n_layers * n_kv_heads * (numbers + (2 * 4 if dtype == torch.int8 else 0))


def _zeros(shape: tuple[int, ...], dtype: Any) -> NDArray[Any]:
    """Returns zeros from the beginning of a cache line on. numpy leaves their pages to the operating system until they
    are written."""
    kind = np.dtype(dtype)
    memory = np.zeros(int(np.prod(shape)) * kind.itemsize + _LINE, dtype=np.uint8)
    start = -memory.ctypes.data % _LINE
    zeros: NDArray[Any] = memory[start : start + memory.size - _LINE].view(kind).reshape(shape)
    return zeros
