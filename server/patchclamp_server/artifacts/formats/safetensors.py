"""Artifacts are stored as safetensors with their metadata in the header; the SHA-256 of these bytes is the id.

The layout (safetensors specification) is: u64 little-endian n · header of n bytes JSON · tensor data. The bytes are
made here and not by the library, because the id must not depend on the order in which a version of the library writes.
Equal content gives equal bytes: keys are sorted, and tensors are ordered by element size (largest first, which keeps
them aligned), then by name.
"""

import json
import math
import struct
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.torch import load as load_safetensors

from patchclamp_server.artifacts.formats.base import ALONE, Beside, Decoded, MalformedFile
from patchclamp_server.artifacts.formats.tensor_names import check_foreign, left_out, named_tensors
from patchclamp_server.artifacts.types import Artifact, ArtifactKind, Metadata
from patchclamp_server.model.info import ModelInfo
from patchclamp_server.model.sites import Site

METADATA_KEY = "patchclamp"
METADATA_VERSION = 1
MAX_HEADER_BYTES = 8 * 1024 * 1024
MAX_PART_BYTES = 8 * 1024 * 1024
DTYPES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.uint8: "U8",
}
_TORCH_DTYPES = {name: dtype for dtype, name in DTYPES.items()}


@dataclass(frozen=True)
class Entry:
    """Where a tensor stands: bytes [start, end) from the end of the header. `dtype`: None for one of no artifact."""

    dtype: torch.dtype | None
    shape: tuple[int, ...]
    start: int
    end: int


@dataclass(frozen=True)
class Header:
    """A header alone. `entries` is by tensor name; `file_bytes` is the length that the whole file must have."""

    metadata: Metadata | None
    entries: dict[str, Entry]
    header_bytes: int
    file_bytes: int

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        return {name: entry.shape for name, entry in self.entries.items()}


def dump(metadata: Metadata, tensors: Mapping[str, torch.Tensor]) -> bytes:
    """Returns the stored bytes. The same metadata and tensors give the same bytes, on every machine and version."""
    return b"".join(parts(metadata, tensors))


def parts(metadata: Metadata, tensors: Mapping[str, torch.Tensor]) -> Iterator[bytes]:
    """Yields the stored bytes in parts of at most MAX_PART_BYTES besides the header: what is mapped from a file need
    not be in memory at once."""
    types = {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()}
    start, order = layout({METADATA_KEY: metadata_json(metadata)}, types)
    yield start
    for name in order:
        flat = _flat(tensors[name])
        for first in range(0, len(flat), MAX_PART_BYTES):
            yield flat[first : first + MAX_PART_BYTES].tobytes()


def layout(
    metadata: Mapping[str, str], types: Mapping[str, tuple[torch.dtype, tuple[int, ...]]]
) -> tuple[bytes, list[str]]:
    """Returns what stands before the data of tensors of these types and shapes, and the order in which they follow."""
    entries: dict[str, Any] = {"__metadata__": dict(metadata)}
    order, offset = sorted(types, key=lambda name: (-types[name][0].itemsize, name)), 0
    for name in order:
        dtype, shape = types[name]
        end = offset + dtype.itemsize * math.prod(shape)
        entries[name] = {"data_offsets": [offset, end], "dtype": DTYPES[dtype], "shape": list(shape)}
        offset = end
    header = _canonical_json(entries).encode("ascii")
    header += b" " * (-len(header) % 8)
    return struct.pack("<Q", len(header)) + header, order


def tensor_bytes(tensor: torch.Tensor) -> bytes:
    """Returns the data of a tensor as it stands in a file."""
    return _flat(tensor).tobytes()


def _flat(tensor: torch.Tensor) -> NDArray[np.uint8]:
    # It is viewed in one dimension first, because a tensor without dimensions has no view as bytes.
    found: NDArray[np.uint8] = tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy()
    return found


def header_length(prefix: bytes) -> int:
    """Returns the length of the JSON header from the first 8 bytes of a file."""
    if len(prefix) < 8:
        raise MalformedFile("not a safetensors file: shorter than 8 bytes")
    length = int(struct.unpack("<Q", prefix[:8])[0])
    if not 2 <= length <= MAX_HEADER_BYTES:
        raise MalformedFile(f"not a safetensors file: a header of {length} bytes (at most {MAX_HEADER_BYTES})")
    return length


def parse_header(header: bytes) -> Header:
    """Parses the header from its JSON bytes, without the 8 bytes before them."""
    try:
        entries = json.loads(header)
    except (ValueError, RecursionError) as error:
        raise MalformedFile(f"not a safetensors file: the header is not JSON ({error})") from error
    if not isinstance(entries, dict):
        raise MalformedFile("not a safetensors file: the header is not a JSON object")
    extra = entries.pop("__metadata__", None)
    text = extra.get(METADATA_KEY) if isinstance(extra, dict) else None
    found, end = {}, 0
    try:
        for name, entry in entries.items():
            shape = tuple(int(n) for n in entry["shape"])
            first, last = (int(n) for n in entry["data_offsets"])
            found[name] = Entry(_TORCH_DTYPES.get(entry["dtype"]), shape, first, last)
            end = max(end, last)
    except (KeyError, TypeError, ValueError, OverflowError) as error:
        raise MalformedFile(f"malformed safetensors header at {name!r}") from error
    return Header(_metadata_from_json(text), found, len(header), 8 + len(header) + end)


def decode(source: bytes | Path, beside: Beside = ALONE) -> Decoded:
    """Returns the tensors, and the metadata if Patchclamp wrote the file; with tensor_names, those that they name.

    MalformedFile: it is no safetensors file. InvalidArgument: tensor_names do not fit.
    """
    data = source if isinstance(source, bytes) else source.read_bytes()
    length = header_length(data)
    if len(data) < 8 + length:
        raise MalformedFile("not a safetensors file: it ends inside the header")
    header = parse_header(data[8 : 8 + length])
    try:
        tensors = load_safetensors(data)
    # The library raises KeyError for an element type that torch lacks.
    except (SafetensorError, KeyError, ValueError) as error:
        raise MalformedFile(f"malformed safetensors file: {error}") from error
    names = beside.tensor_names
    if not names:
        return Decoded(tensors, header.metadata)
    check_foreign(header.metadata)
    return Decoded(
        named_tensors(tensors, names),
        provenance={"method": "imported", "format": "safetensors", "tensor_names": dict(names)},
        imported_from=dict(names),
        warnings=left_out(tensors, names.values()),
    )


def encode(artifact: Artifact, model: ModelInfo | None = None) -> bytes:
    """Returns the stored bytes, whose SHA-256 is the artifact's id."""
    return dump(artifact.info.metadata, artifact.tensors)


def _canonical_json(value: Any) -> str:
    return json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False)


def metadata_json(metadata: Metadata) -> str:
    """Returns the canonical JSON that stands in the header."""
    return _canonical_json(
        {
            "version": METADATA_VERSION,
            "kind": metadata.kind.value,
            "model_fingerprint": metadata.model_fingerprint,
            "site": metadata.site.value if metadata.site else None,
            "description": metadata.description,
            "provenance": metadata.provenance,
            "evidence": metadata.evidence,
        }
    )


def _metadata_from_json(text: object) -> Metadata | None:
    if text is None:
        return None
    try:
        fields = json.loads(text) if isinstance(text, str) else None
        if not isinstance(fields, dict) or fields["version"] != METADATA_VERSION:
            raise MalformedFile(f"metadata {METADATA_KEY!r} is not of version {METADATA_VERSION}")
        metadata = Metadata(
            kind=ArtifactKind(fields["kind"]),
            model_fingerprint=fields["model_fingerprint"],
            site=Site(fields["site"]) if fields["site"] is not None else None,
            description=fields["description"],
            provenance=fields["provenance"],
            evidence=fields["evidence"],
        )
    except (KeyError, ValueError, RecursionError) as error:
        raise MalformedFile(f"malformed metadata {METADATA_KEY!r}: {error}") from error
    texts = isinstance(metadata.model_fingerprint, str) and isinstance(metadata.description, str)
    if not texts or not isinstance(metadata.provenance, dict) or not isinstance(metadata.evidence, dict):
        raise MalformedFile(f"malformed metadata {METADATA_KEY!r}: a field has the wrong type")
    return metadata
