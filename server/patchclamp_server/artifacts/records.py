"""Small JSON objects by name, beside the artifacts: what servers that share a store tell each other."""

import json
from collections.abc import Mapping
from contextlib import suppress
from typing import Any

from patchclamp_server.artifacts.blobs import BlobStore


class Records:
    """Those of one directory of the store. Nothing is kept: every reading is of what is there now."""

    def __init__(self, blobs: BlobStore, directory: str) -> None:
        self._blobs, self._directory = blobs, directory

    def read(self) -> dict[str, Any]:
        """By name. What is not JSON is None."""
        return {name: _parsed(data) for name, data in self._blobs.read_all(self._directory).items()}

    def create(self, name: str, content: Mapping[str, Any]) -> bool:
        """False, where there is one of that name. ResourceExhausted: no room."""
        try:
            self._blobs.create(self._path(name), _bytes(content))
        except FileExistsError:
            return False
        return True

    def write(self, name: str, content: Mapping[str, Any]) -> None:
        """In place of what is there. ResourceExhausted: no room."""
        self._blobs.write(self._path(name), _bytes(content))

    def remove(self, name: str) -> None:
        """Nothing, where there is none: another server may remove it at the same time."""
        with suppress(FileNotFoundError):
            self._blobs.remove(self._path(name))

    def _path(self, name: str) -> str:
        return f"{self._directory}/{name}"


def _bytes(content: Mapping[str, Any]) -> bytes:
    return json.dumps(content, indent=1).encode()


def _parsed(data: bytes) -> Any:
    try:
        return json.loads(data)
    except (ValueError, RecursionError):
        return None
