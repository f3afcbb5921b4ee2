"""A file (or several that belong together) that is read again when it changes. A broken one keeps what was read before.

A change is seen by time, size and inode, so a file that is replaced by renaming, or by moving a symbolic link as
Kubernetes does with secrets, is seen as well.
"""

import logging
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Generic, TypeVar

from prometheus_client import Counter

from patchclamp_server.security.configuration import ConfigurationError

log = logging.getLogger(__name__)

T = TypeVar("T")


class WatchedFile(Generic[T]):
    """`value` is what `read` made of the files last. `name` is the label of `reloads`."""

    def __init__(self, name: str, paths: Sequence[Path], read: Callable[[], T], reloads: Counter) -> None:
        """Raises ConfigurationError when the files cannot be used: there is nothing to keep yet."""
        self.name = name
        self._paths = tuple(paths)
        self._read = read
        self._reloads = reloads
        self._seen = self._signature()
        self.value = read()

    def poll(self) -> bool:
        """Reads what has changed. True when there is a new value."""
        # Taken before reading: what changes meanwhile is seen next time.
        signature = self._signature()
        if signature == self._seen:
            return False
        self._seen = signature
        try:
            self.value = self._read()
        except ConfigurationError as error:
            log.error("%s changed and cannot be used, what was read before stays in force: %s", self.name, error)
            self._reloads.labels(self.name, "failed").inc()
            return False
        log.info("%s was read again", self.name)
        self._reloads.labels(self.name, "ok").inc()
        return True

    def _signature(self) -> tuple[tuple[int, int, int] | None, ...]:
        return tuple(map(_signature, self._paths))


def read_text(path: Path) -> str:
    """Raises ConfigurationError when there is no such file, or no text in it."""
    try:
        return path.read_text("utf-8")
    except OSError as error:
        raise ConfigurationError(f"cannot read {path}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise ConfigurationError(f"{path} is not UTF-8 text") from error


def _signature(path: Path) -> tuple[int, int, int] | None:
    try:
        status = path.stat()
    except OSError:
        return None
    return status.st_mtime_ns, status.st_size, status.st_ino
