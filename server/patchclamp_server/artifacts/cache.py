"""The cache keeps the artifacts used last in memory, up to a number of bytes."""

import threading
from collections import OrderedDict

from patchclamp_server.artifacts.types import Artifact


class ArtifactCache:
    """Drops the least recently used first. Artifacts never change, so an entry is never stale. Thread-safe."""

    def __init__(self, max_bytes: int) -> None:
        self.max_bytes = max_bytes
        self._entries: OrderedDict[str, Artifact] = OrderedDict()
        self._bytes = 0
        self._lock = threading.Lock()

    def get(self, artifact_id: str) -> Artifact | None:
        with self._lock:
            artifact = self._entries.get(artifact_id)
            if artifact is not None:
                self._entries.move_to_end(artifact_id)
            return artifact

    def put(self, artifact: Artifact) -> None:
        with self._lock:
            self._drop(artifact.info.id)
            self._entries[artifact.info.id] = artifact
            self._bytes += artifact.info.size_bytes
            while self._bytes > self.max_bytes:
                self._drop(next(iter(self._entries)))

    def remove(self, artifact_id: str) -> None:
        with self._lock:
            self._drop(artifact_id)

    def _drop(self, artifact_id: str) -> None:
        artifact = self._entries.pop(artifact_id, None)
        if artifact is not None:
            self._bytes -= artifact.info.size_bytes
