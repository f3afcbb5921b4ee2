"""SHA-256 digests of model files are remembered, so that a start does not read hundreds of megabytes again.

A safetensors file is digested tensor by tensor, so that the order, sharding and comments of its tensors do not matter.
Any other file is digested as its bytes.
"""

import functools
import hashlib
import json
import logging
import os
import struct
from collections.abc import Callable, Mapping
from itertools import pairwise
from pathlib import Path
from typing import BinaryIO

from patchclamp_server.files import cache_root, write_atomically
from patchclamp_server.model.errors import ModelSourceError

logger = logging.getLogger(__name__)

CHUNK_BYTES = 1 << 22
# This is the limit of the safetensors format: a file with a longer header is not a safetensors file.
MAX_HEADER_BYTES = 100_000_000

# This is called with the number of bytes just read.
OnBytes = Callable[[int], None]
# The digest of each part of a file, by tensor name; a file that is one part has the name "".
Parts = dict[str, str]


def sha256_of_file(path: Path, on_bytes: OnBytes | None = None) -> str:
    """Returns the hexadecimal SHA-256 of a file's bytes, from the cache when the file has not changed since."""
    return _parts(path, "bytes", _byte_parts, on_bytes)[""]


def tensor_digests(path: Path, on_bytes: OnBytes | None = None) -> Parts:
    """Returns ``{tensor: "dtype shape sha256(data)"}`` of a safetensors file. ModelSourceError: it is not one."""
    return _parts(path, "tensors", _tensor_parts, on_bytes)


def span_digests(path: Path, spans: Mapping[str, tuple[int, int]], on_bytes: OnBytes | None = None) -> Parts:
    """Returns digests of parts of a file, which lie at (offset, size)."""

    def read(path: Path, on_bytes: OnBytes) -> Parts:
        parts = {}
        with path.open("rb") as file:
            for name, (offset, size) in spans.items():
                file.seek(offset)
                parts[name] = _digest(file, size, on_bytes)
        return parts

    return _parts(path, "spans", read, on_bytes)


def tensor_dtypes(path: Path) -> dict[str, str]:
    """Returns dtypes by tensor name, from the header of a safetensors file alone. ModelSourceError: it is not one."""
    with path.open("rb") as file:
        header, _ = read_header(path, file)
    return {name: str(entry["dtype"]) for name, entry in header.items()}


def content_digest(path: Path, on_bytes: OnBytes | None = None) -> str:
    """Returns one digest of a file: over its tensors for ``*.safetensors``, else over its bytes."""
    if path.suffix == ".safetensors":
        return digest_of_parts(tensor_digests(path, on_bytes))
    return sha256_of_file(path, on_bytes)


def digest_of_parts(parts: Parts) -> str:
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


def rename_remembered(source: Path, target: Path) -> None:
    """Tells the cache that the unchanged file `source` is now at `target`."""
    for kind in ("bytes", "tensors"):
        parts = _recall(source, target.stat(), kind)
        if parts is not None:
            _remember(target, target.stat(), kind, parts)
            _record_path(source, kind).unlink(missing_ok=True)


def _parts(path: Path, kind: str, read: Callable[[Path, OnBytes], Parts], on_bytes: OnBytes | None) -> Parts:
    path = path.resolve()
    before = path.stat()
    if (parts := _recall(path, before, kind)) is not None:
        return parts
    parts = read(path, on_bytes or (lambda _: None))
    after = path.stat()
    # A file that was written to meanwhile has no digest worth remembering.
    if (before.st_size, before.st_mtime_ns) == (after.st_size, after.st_mtime_ns):
        _remember(path, before, kind, parts)
    return parts


def _byte_parts(path: Path, on_bytes: OnBytes) -> Parts:
    with path.open("rb") as file:
        return {"": _digest(file, path.stat().st_size, on_bytes)}


def _tensor_parts(path: Path, on_bytes: OnBytes) -> Parts:
    parts = {}
    with path.open("rb") as file:
        header, data_start = read_header(path, file)
        for name, entry in sorted(header.items(), key=lambda item: item[1]["data_offsets"][0]):
            begin, end = entry["data_offsets"]
            file.seek(data_start + begin)
            shape = ",".join(str(size) for size in entry["shape"])
            parts[name] = f"{entry['dtype']} [{shape}] {_digest(file, end - begin, on_bytes)}"
    return parts


def read_header(path: Path, file: BinaryIO) -> tuple[dict[str, dict[str, list[int]]], int]:
    """Returns the entries of the tensors and where their data begins. The layout is: u64 length, JSON header, data.

    Raises ModelSourceError for a file that is not safetensors, or not whole.
    """
    size = path.stat().st_size
    length_bytes = file.read(8)
    (length,) = struct.unpack("<Q", length_bytes) if len(length_bytes) == 8 else (0,)
    if not 0 < length <= min(MAX_HEADER_BYTES, size - 8):
        raise ModelSourceError(f"{path} is not a safetensors file: it has no header")
    try:
        header = json.loads(file.read(length))
    except ValueError as error:
        raise ModelSourceError(f"{path} is not a safetensors file: its header is not JSON") from error
    data_start = 8 + length
    try:
        header.pop("__metadata__", None)
        spans = [tuple(map(int, entry["data_offsets"])) for entry in header.values()]
        sound = all(entry["dtype"] and isinstance(entry["shape"], list) for entry in header.values())
        sound = sound and all(0 <= begin <= end for begin, end in spans)
    except (AttributeError, KeyError, TypeError, ValueError):
        sound = False
    if not sound:
        raise ModelSourceError(f"{path} is not a safetensors file: its header does not list tensors")
    if data_start + max((end for _, end in spans), default=0) != size:
        raise ModelSourceError(f"{path} is cut short or has bytes that belong to no tensor")
    for (_, end), (begin, _) in pairwise(sorted(spans)):
        if begin != end:
            what = "tensors that overlap" if begin < end else "bytes that belong to no tensor"
            raise ModelSourceError(f"{path} is damaged: it has {what}")
    return header, data_start


def _digest(file: BinaryIO, size: int, on_bytes: OnBytes) -> str:
    digest = hashlib.sha256()
    while size > 0 and (chunk := file.read(min(size, CHUNK_BYTES))):
        digest.update(chunk)
        size -= len(chunk)
        on_bytes(len(chunk))
    return digest.hexdigest()


def _record_path(path: Path, kind: str) -> Path:
    return cache_root() / "digests" / f"{hashlib.sha256(os.fsencode(path)).hexdigest()}.{kind}.json"


def _recall(path: Path, stat: os.stat_result, kind: str) -> Parts | None:
    try:
        record = json.loads(_record_path(path, kind).read_bytes())
    # OSError means that nothing is remembered, or that it cannot be read.
    except (OSError, ValueError):
        return None
    if not isinstance(record, dict):
        return None
    if [record.get("path"), record.get("size"), record.get("mtime_ns")] != [str(path), stat.st_size, stat.st_mtime_ns]:
        return None
    parts: Parts = record["parts"]
    return parts


def _remember(path: Path, stat: os.stat_result, kind: str, parts: Parts) -> None:
    """Remembers digests where the cache can be written. Others are computed again at the next start."""
    record = {"path": str(path), "size": stat.st_size, "mtime_ns": stat.st_mtime_ns, "parts": parts}
    where = ""
    try:
        where = f"{cache_root()}: "
        write_atomically(_record_path(path, kind), json.dumps(record).encode())
    except OSError as error:
        _say_once(f"{where}{error.strerror or error}")


@functools.cache
def _say_once(reason: str) -> None:
    logger.warning("digests of model files cannot be remembered, and will be computed at every start: %s", reason)
