"""Reads the header of a GGUF file: keys with values, and for each tensor its format, its shape and where it lies.

The layout (docs/gguf.md of ggml), little-endian: "GGUF", u32 version, u64 tensors, u64 keys; for each key its name,
u32 type, value; for each tensor its name, u32 dimensions, u64 sizes (columns first), u32 format, u64 offset; the data
begins at the next multiple of `general.alignment`. A string is u64 length and UTF-8.

This is written out here because the reader of the package `gguf` makes several arrays of every token, which takes
seconds for a vocabulary.
"""

import struct
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from patchclamp_server.model.errors import ModelSourceError
from patchclamp_server.model.mapping import mapped

MAGIC = b"GGUF"
VERSIONS = (2, 3)
DEFAULT_ALIGNMENT = 32
MAX_DIMENSIONS = 4
_NUMBERS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_STRING, _ARRAY = 8, 9


@dataclass(frozen=True, eq=False)
class Entry:
    """A tensor at byte `offset` of its file: `format` is its number in GGML, `shape` has the rows first, `memory` is
    all of the file from its start on."""

    file: Path
    offset: int
    format: int
    shape: tuple[int, ...]
    memory: NDArray[np.uint8]


@dataclass(frozen=True, eq=False)
class Header:
    """`metadata` are the bytes before the tensors are listed."""

    path: Path
    values: dict[str, Any]
    entries: dict[str, Entry]
    metadata: NDArray[np.uint8]


def read_header(path: Path) -> Header:
    """Raises ModelSourceError for a file that is not GGUF, or whose header is damaged or cut off."""
    memory = mapped(path)
    if bytes(memory[:4]) != MAGIC:
        raise ModelSourceError(f"{path} is not a GGUF file")
    reader = _Reader(memory)
    try:
        return _read(path, memory, reader)
    except (_Damaged, struct.error, UnicodeDecodeError) as error:
        raise ModelSourceError(f"{path} is not a whole GGUF file: {error}") from error


class _Damaged(Exception):
    pass


def _read(path: Path, memory: NDArray[np.uint8], reader: "_Reader") -> Header:
    reader.at = len(MAGIC)
    version, n_tensors, n_keys = reader.number("I"), reader.number("Q"), reader.number("Q")
    if version not in VERSIONS:
        shown = "that of another byte order" if version % 65536 == 0 else version
        raise _Damaged(f"its version is {shown}, not one of {', '.join(map(str, VERSIONS))}")
    values: dict[str, Any] = {}
    for _ in range(n_keys):
        key = reader.string()
        if key in values:
            raise _Damaged(f"the key {key} is there twice")
        values[key] = reader.value(reader.number("I"))
    metadata = memory[: reader.at]
    listed: dict[str, tuple[int, tuple[int, ...], int]] = {}
    for _ in range(n_tensors):
        name = reader.string()
        if name in listed:
            raise _Damaged(f"the tensor {name} is there twice")
        dimensions = reader.number("I")
        if not 1 <= dimensions <= MAX_DIMENSIONS:
            raise _Damaged(f"the tensor {name} has {dimensions} dimensions")
        shape = tuple(reader.number("Q") for _ in range(dimensions))[::-1]
        listed[name] = (reader.number("I"), shape, reader.number("Q"))
    alignment = values.get("general.alignment", DEFAULT_ALIGNMENT)
    if type(alignment) is not int or alignment <= 0 or alignment & (alignment - 1):
        raise _Damaged(f"general.alignment is {alignment}, not a power of two")
    start = -(-reader.at // alignment) * alignment
    entries = {}
    for name, (format, shape, offset) in listed.items():
        if not prod(shape):
            raise _Damaged(f"the tensor {name} has shape {list(shape)}")
        if offset % alignment:
            raise _Damaged(f"the tensor {name} begins at {offset}, not at a multiple of {alignment}")
        if start + offset >= len(memory):
            raise _Damaged(f"the tensor {name} begins behind its end")
        entries[name] = Entry(path, start + offset, format, shape, memory[start + offset :])
    return Header(path, values, entries, metadata)


class _Reader:
    """Goes through the header; struct.error and _Damaged say that it leads out of the file."""

    def __init__(self, memory: NDArray[np.uint8]) -> None:
        self._memory = memory.data
        self.at = 0

    def number(self, code: str) -> Any:
        (value,) = struct.unpack_from(f"<{code}", self._memory, self.at)
        self.at += struct.calcsize(f"<{code}")
        return value

    def string(self) -> str:
        size = self.number("Q")
        return str(self._taken(size), "utf-8")

    def value(self, kind: int) -> Any:
        if kind == _STRING:
            return self.string()
        if kind == _ARRAY:
            return self._array()
        return self.number(self._code(kind))

    def _array(self) -> list[Any]:
        kind, n = self.number("I"), self.number("Q")
        if kind == _STRING:
            return self._strings(n)
        code = self._code(kind)
        data = self._taken(n * struct.calcsize(f"<{code}"))
        values: list[Any] = np.frombuffer(data, dtype=np.dtype(code).newbyteorder("<")).tolist()
        return values

    def _strings(self, n: int) -> list[str]:
        """The same as n calls of `string`, in a third of the time: a vocabulary has hundreds of thousands."""
        memory, at, end = self._memory, self.at, len(self._memory)
        unpack, strings = struct.Struct("<Q").unpack_from, []
        for _ in range(n):
            (size,) = unpack(memory, at)
            at += 8
            if size > end - at:
                raise _Damaged("it ends within its header")
            strings.append(str(memory[at : at + size], "utf-8"))
            at += size
        self.at = at
        return strings

    def _code(self, kind: int) -> str:
        if kind not in _NUMBERS:
            raise _Damaged(f"it has a value of type {kind}")
        return _NUMBERS[kind]

    def _taken(self, size: int) -> memoryview:
        if size > len(self._memory) - self.at:
            raise _Damaged("it ends within its header")
        taken = self._memory[self.at : self.at + size]
        self.at += size
        return taken
