"""The audit log is a file of JSON lines, written by a thread of its own; it may be rotated by renaming the file.

Nothing waits for the disk. A line that cannot be written (because the disk is full, or so slow that the queue is full)
is counted, and serving goes on.
"""

import json
import logging
import os
import queue
import threading
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from patchclamp_server.security.configuration import ConfigurationError

log = logging.getLogger(__name__)

MAX_QUEUED = 10_000


class AuditLog:
    def __init__(self, path: Path, on_lost: Callable[[], None]) -> None:
        """Raises ConfigurationError when the file cannot be opened for appending."""
        self._path = path
        self._on_lost = on_lost
        self._queue: queue.Queue[bytes | None] = queue.Queue(MAX_QUEUED)
        self._file: int | None = None
        self._torn = False  # whether the last line was written only in part
        self._failing = False
        try:
            self._open()
        except OSError as error:
            raise ConfigurationError(f"cannot write the audit log {path}: {error.strerror}") from error
        self._thread = threading.Thread(target=self._run, name="patchclamp-audit", daemon=True)
        self._thread.start()

    def write(self, entry: Mapping[str, Any]) -> None:
        """Queues an entry; it never blocks and never fails."""
        try:
            self._queue.put_nowait(json.dumps(entry, separators=(",", ":")).encode() + b"\n")
        except queue.Full:
            self._on_lost()

    def close(self) -> None:
        """Returns when everything is written."""
        self._queue.put(None)
        self._thread.join()

    def _run(self) -> None:
        while (line := self._queue.get()) is not None:
            try:
                self._append(line)
            except OSError as error:
                if not self._failing:
                    log.error("lines of the audit log are lost: %s: %s", self._path, error.strerror)
                self._failing = True
                self._on_lost()
            else:
                self._failing = False
        if self._file is not None:
            os.close(self._file)

    def _append(self, line: bytes) -> None:
        if self._file is None or self._was_moved(self._file):
            self._open()
        assert self._file is not None
        data = b"\n" + line if self._torn else line
        while data:
            # A disk that is nearly full takes only a part of the data; the next write then raises the reason.
            data = data[os.write(self._file, data) :]
            self._torn = bool(data)

    def _open(self) -> None:
        if self._file is not None:
            os.close(self._file)
            self._file = None
        self._file = os.open(self._path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o600)
        self._torn = False

    def _was_moved(self, file: int) -> bool:
        mine = os.fstat(file)
        try:
            there = self._path.stat()
        except FileNotFoundError:
            return True
        return (mine.st_dev, mine.st_ino) != (there.st_dev, there.st_ino)
