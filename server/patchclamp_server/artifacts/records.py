"""Records are small JSON objects beside the artifacts, by which servers that share a store tell each other things."""

import json
from collections.abc import Mapping
from contextlib import suppress
from typing import Any

from patchclamp_server.artifacts.blobs import BlobStore


class Records:
    """The records of one directory of the store. Nothing is cached: every read sees what is there now."""

    def __init__(self, blobs: BlobStore, directory: str) -> None:
        self._blobs, self._directory = blobs, directory

    def read(self) -> dict[str, Any]:
        """Returns the records by name, with None for one that is not JSON."""
        return {name: _parsed(data) for name, data in self._blobs.read_all(self._directory).items()}

    def create(self, name: str, content: Mapping[str, Any]) -> bool:
        """Returns False where a record of that name exists. Raises ResourceExhausted when there is no room."""
        try:
            self._blobs.create(self._path(name), _bytes(content))
        except FileExistsError:
            return False
        return True

    def write(self, name: str, content: Mapping[str, Any]) -> None:
        """Writes a record, in place of one of that name. Raises ResourceExhausted when there is no room."""
        self._blobs.write(self._path(name), _bytes(content))

    def remove(self, name: str) -> None:
        """Removes a record, if it exists: another server may remove it at the same time."""
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
