"""Tensors of a safetensors file are read by rows, so that a file of hundreds of megabytes need not fit into memory."""

import math
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from patchclamp_server.artifacts.formats.base import MalformedFile
from patchclamp_server.artifacts.formats.safetensors import Entry, Header, header_length, parse_header

# A block of rows takes at most this many bytes of the file, or one row.
BLOCK_BYTES = 2 << 20
# Rows that are asked for are read together with what stands between them, if that is at most so many bytes.
_GAP_BYTES = 64 << 10


class TensorRows(Protocol):
    """Tensors of at least one dimension that need not be in memory. A row is one index of the first dimension."""

    @property
    def shapes(self) -> Mapping[str, tuple[int, ...]]: ...

    @property
    def dtypes(self) -> Mapping[str, torch.dtype]: ...

    def rows(self, name: str, start: int, end: int) -> Tensor: ...


def blocks(tensors: TensorRows, name: str) -> Iterator[tuple[int, Tensor]]:
    """Yields the number of the first row and the rows of each block of BLOCK_BYTES, together all of a tensor."""
    count, *row = tensors.shapes[name]
    step = max(1, BLOCK_BYTES // max(1, math.prod(row) * tensors.dtypes[name].itemsize))
    for start in range(0, count, step):
        yield start, tensors.rows(name, start, min(start + step, count))


class TensorFile:
    """`read` returns bytes [start, end) of a file with this header, whose element types are all known.

    A row is one index of the first dimension. Unknown names raise KeyError, rows outside IndexError.
    """

    def __init__(self, header: Header, read: Callable[[int, int], bytes]) -> None:
        self.header, self._read = header, read
        self.metadata = header.metadata
        self._shapes = header.shapes
        self._dtypes = {name: _dtype(entry) for name, entry in header.entries.items()}

    @property
    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        return self._shapes

    @property
    def dtypes(self) -> Mapping[str, torch.dtype]:
        return self._dtypes

    def read(self, start: int, end: int) -> bytes:
        """Returns bytes [start, end) of the file."""
        return self._read(start, end)

    def tensor(self, name: str) -> Tensor:
        return self.rows(name, 0, self.shapes[name][0])

    def rows(self, name: str, start: int, end: int) -> Tensor:
        """Returns rows [start, end) as a tensor of its own, in the type of the file."""
        entry = self.header.entries[name]
        count, *row = entry.shape
        if not 0 <= start <= end <= count:
            raise IndexError(f"rows {start} to {end} of {name}, which has {count}")
        row_bytes = (entry.end - entry.start) // count
        first = 8 + self.header.header_bytes + entry.start
        data = bytearray(self._read(first + start * row_bytes, first + end * row_bytes))
        found = torch.frombuffer(data, dtype=_dtype(entry)) if data else torch.empty(0, dtype=_dtype(entry))
        return found.view(end - start, *row)

    def chosen(self, name: str, rows: Sequence[int]) -> Tensor:
        """Returns these rows in their order; what is read is them, and short pieces between neighbours."""
        entry = self.header.entries[name]
        row_bytes = max(1, (entry.end - entry.start) // entry.shape[0])
        found = torch.empty(len(rows), *entry.shape[1:], dtype=_dtype(entry))
        places = sorted(range(len(rows)), key=rows.__getitem__)
        for run in _runs(places, rows, _GAP_BYTES // row_bytes, BLOCK_BYTES // row_bytes):
            first = rows[run[0]]
            block = self.rows(name, first, rows[run[-1]] + 1)
            found[run] = block[[rows[place] - first for place in run]]
        return found

    def columns(self, name: str, start: int, end: int) -> Tensor:
        """Returns columns [start, end) of a matrix, as the rows of what is returned."""
        entry = self.header.entries[name]
        count, width = entry.shape
        first, size = 8 + self.header.header_bytes + entry.start, _dtype(entry).itemsize
        data = bytearray()
        for row in range(count):
            data += self._read(first + (row * width + start) * size, first + (row * width + end) * size)
        return torch.frombuffer(data, dtype=_dtype(entry)).view(count, end - start).T.contiguous()


@contextmanager
def open_tensor_file(path: Path) -> Iterator[TensorFile]:
    """A safetensors file on a local disk. MalformedFile: it is none, or not one of types and sizes that it says."""
    with path.open("rb") as file:
        length = header_length(file.read(8))
        header = parse_header(file.read(length))
        size = path.stat().st_size
        if header.header_bytes < length or header.file_bytes != size:
            raise MalformedFile(f"not a safetensors file: {size} bytes instead of {header.file_bytes}")
        for name, entry in header.entries.items():
            if entry.dtype is None:
                raise MalformedFile(f"malformed safetensors file: {name!r:.200} has an element type of no artifact")
            if entry.end - entry.start != entry.dtype.itemsize * math.prod(entry.shape) or entry.start < 0:
                raise MalformedFile(f"malformed safetensors header at {name!r:.200}")
        yield TensorFile(header, lambda start, end: os.pread(file.fileno(), end - start, start))


def _runs(places: Sequence[int], rows: Sequence[int], gap: int, most: int) -> Iterator[list[int]]:
    """Yields the places whose rows are read together: neighbours at most `gap` apart, over at most `most` rows."""
    run: list[int] = []
    for place in places:
        if run and (rows[place] - rows[run[-1]] > gap + 1 or rows[place] - rows[run[0]] >= max(1, most)):
            yield run
            run = []
        run.append(place)
    if run:
        yield run


def _dtype(entry: Entry) -> torch.dtype:
    assert entry.dtype is not None, "a stored file has element types of artifacts"
    return entry.dtype
