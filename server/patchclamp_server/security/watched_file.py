"""A watched file (or several that belong together) is read again when it changes. A broken one changes nothing.

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
    """`value` is what `read` last made of the files. `name` is the label of `reloads`."""

    def __init__(self, name: str, paths: Sequence[Path], read: Callable[[], T], reloads: Counter) -> None:
        """Reads the files. Raises ConfigurationError when they cannot be used: there is nothing to keep yet."""
        self.name = name
        self._paths = tuple(paths)
        self._read = read
        self._reloads = reloads
        self._seen = self._signature()
        self.value = read()

    def poll(self) -> bool:
        """Reads the files if they have changed, and returns whether there is a new value."""
        # The signature is taken before reading, so that a change meanwhile is seen next time.
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
    """Reads UTF-8 text. Raises ConfigurationError where the file cannot be read or is not text."""
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
