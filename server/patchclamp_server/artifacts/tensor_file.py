"""Tensors of a safetensors file are read by rows, so that a file of hundreds of megabytes need not fit into memory."""

from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from patchclamp_server.artifacts.formats.safetensors import Entry, Header

# A block of rows takes at most this many bytes of the file, or one row.
BLOCK_BYTES = 8 << 20
# Rows that are asked for are read together with what stands between them, if that is at most so many bytes.
_GAP_BYTES = 64 << 10


class TensorFile:
    """`read` returns bytes [start, end) of a file with this header, whose element types are all known.

    A row is one index of the first dimension. Unknown names raise KeyError, rows outside IndexError.
    """

    def __init__(self, header: Header, read: Callable[[int, int], bytes]) -> None:
        self._header, self._read = header, read
        self.shapes = header.shapes
        self.dtypes = {name: _dtype(entry) for name, entry in header.entries.items()}

    def tensor(self, name: str) -> Tensor:
        return self.rows(name, 0, self.shapes[name][0])

    def rows(self, name: str, start: int, end: int) -> Tensor:
        """Returns rows [start, end) as a tensor of its own, in the type of the file."""
        entry = self._header.entries[name]
        count, *row = entry.shape
        if not 0 <= start <= end <= count:
            raise IndexError(f"rows {start} to {end} of {name}, which has {count}")
        row_bytes = (entry.end - entry.start) // count
        first = 8 + self._header.header_bytes + entry.start
        data = bytearray(self._read(first + start * row_bytes, first + end * row_bytes))
        found = torch.frombuffer(data, dtype=_dtype(entry)) if data else torch.empty(0, dtype=_dtype(entry))
        return found.view(end - start, *row)

    def chosen(self, name: str, rows: Sequence[int]) -> Tensor:
        """Returns these rows in their order; what is read is them, and short pieces between neighbours."""
        entry = self._header.entries[name]
        row_bytes = max(1, (entry.end - entry.start) // entry.shape[0])
        found = torch.empty(len(rows), *entry.shape[1:], dtype=_dtype(entry))
        places = sorted(range(len(rows)), key=rows.__getitem__)
        for run in _runs(places, rows, _GAP_BYTES // row_bytes, BLOCK_BYTES // row_bytes):
            first = rows[run[0]]
            block = self.rows(name, first, rows[run[-1]] + 1)
            found[run] = block[[rows[place] - first for place in run]]
        return found

    def blocks(self, name: str) -> Iterator[tuple[int, Tensor]]:
        """Yields the number of the first row and the rows of each block, together all of the tensor."""
        entry = self._header.entries[name]
        count = entry.shape[0]
        step = max(1, BLOCK_BYTES * count // max(1, entry.end - entry.start))
        for start in range(0, count, step):
            yield start, self.rows(name, start, min(start + step, count))


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
