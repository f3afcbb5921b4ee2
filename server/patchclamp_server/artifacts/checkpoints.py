"""Unfinished jobs, so that a restart loses little: tensors by the key of the job, beside the artifacts of a store.

    checkpoints/<key>    SHA-256 of what follows, 32 bytes · safetensors, whose metadata say how far the job was

A checkpoint takes the place of the one before in one step, so that a crash leaves the one or the other. There are at
most `most` of them and `most_bytes` together: beyond that the oldest are removed, never the one that was just written.
"""

import hashlib
import json
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from patchclamp_server.artifacts.blobs import BlobStore
from patchclamp_server.artifacts.formats import safetensors
from patchclamp_server.artifacts.formats.base import MalformedFile

DIRECTORY = "checkpoints"
MOST = 16
MOST_BYTES = 8 << 30
_DIGEST_BYTES = 32
_ABOUT = "about"


class DamagedCheckpoint(Exception):
    """What is stored is not what was written. The message says why."""


@dataclass(frozen=True, eq=False)
class Saved:
    """`about`: JSON that says how far the job was."""

    tensors: dict[str, Tensor]
    about: dict[str, Any]


class Checkpoints:
    """Those of one store. Methods may be called from any thread; keys are letters and digits."""

    def __init__(self, blobs: BlobStore, most: int = MOST, most_bytes: int = MOST_BYTES) -> None:
        self._blobs, self._most, self._most_bytes = blobs, most, most_bytes

    def save(self, key: str, tensors: Mapping[str, Tensor], about: Mapping[str, Any]) -> None:
        """In place of the last one of this key. ResourceExhausted: no room."""
        data = save(dict(tensors), metadata={_ABOUT: json.dumps(about)})
        self._blobs.write(f"{DIRECTORY}/{key}", hashlib.sha256(data).digest() + data)
        self._bound(key)

    def load(self, key: str) -> Saved | None:
        """None where there is none. Raises DamagedCheckpoint."""
        try:
            stored = self._blobs.read(f"{DIRECTORY}/{key}")
        except FileNotFoundError:
            return None
        digest, data = stored[:_DIGEST_BYTES], stored[_DIGEST_BYTES:]
        if hashlib.sha256(data).digest() != digest:
            raise DamagedCheckpoint("its bytes do not have the SHA-256 that was written before them")
        try:
            length = safetensors.header_length(data)
            metadata = json.loads(data[8 : 8 + length])["__metadata__"]
            return Saved(load(data), json.loads(metadata[_ABOUT]))
        except (MalformedFile, SafetensorError, ValueError, KeyError) as error:
            raise DamagedCheckpoint(f"not a checkpoint: {error}") from error

    def remove(self, key: str) -> None:
        """Nothing, where there is none."""
        with suppress(FileNotFoundError):
            self._blobs.remove(f"{DIRECTORY}/{key}")

    def keys(self) -> list[str]:
        return self._blobs.names(DIRECTORY)

    def _bound(self, newest: str) -> None:
        sizes: dict[str, tuple[float, int]] = {}
        for key in self.keys():
            # Another job may have ended meanwhile.
            with suppress(FileNotFoundError):
                size, written = self._blobs.stat(f"{DIRECTORY}/{key}")
                sizes[key] = written, size
        others = sorted((written, key) for key, (written, _) in sizes.items() if key != newest)
        while others and (len(sizes) > self._most or sum(size for _, size in sizes.values()) > self._most_bytes):
            _, oldest = others.pop(0)
            del sizes[oldest]
            self.remove(oldest)
