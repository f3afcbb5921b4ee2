"""Where files of ours are kept, and how they are written: bytes and names are on the disk before they count."""

import os
import shutil
import tempfile
import time
from collections.abc import Iterable
from contextlib import suppress
from enum import Enum
from errno import ENOENT
from pathlib import Path
from uuid import uuid4


def cache_root() -> Path:
    """Returns the root for what can be made again: $PATCHCLAMP_CACHE, else patchclamp in the XDG cache home.

    Raises OSError where that is below a home that is not known: it is as good as one that cannot be written.
    """
    try:
        if configured := os.environ.get("PATCHCLAMP_CACHE"):
            return Path(configured).expanduser()
        home = os.environ.get("XDG_CACHE_HOME")
        return (Path(home) if home else Path.home() / ".cache") / "patchclamp"
    except RuntimeError as error:
        raise FileNotFoundError(ENOENT, "this user has no home directory, and PATCHCLAMP_CACHE names none") from error


def sync(path: Path) -> None:
    """Returns when a file, or the names in a directory, are on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_synced(path: Path, parts: Iterable[bytes]) -> None:
    """Writes a new file, whose name is not synced yet. Raises FileExistsError if there is one."""
    with path.open("xb") as file:
        file.writelines(parts)
        file.flush()
        os.fsync(file.fileno())


def write_atomically(path: Path, data: bytes) -> None:
    """Replaces a file: a reader sees the old one or the new one, whatever happens in between."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{uuid4().hex}")
    try:
        write_synced(temporary, (data,))
        os.replace(temporary, path)
    finally:
        with suppress(FileNotFoundError):
            temporary.unlink()


def make_directories(directory: Path) -> None:
    """Creates a directory and those above it. The entry of each in its parent is synced too."""
    if directory.is_dir():
        return
    make_directories(directory.parent)
    directory.mkdir(exist_ok=True)
    sync(directory.parent)


class Spool(Enum):
    """What is written to directories of the system's temporary folder that are gone when it is done: how their names
    begin."""

    UPLOAD = "patchclamp-upload-"
    ACTIVATIONS = "patchclamp-activations-"
    GGUF = "patchclamp-gguf-"


def spool_directory(spool: Spool) -> tempfile.TemporaryDirectory[str]:
    return tempfile.TemporaryDirectory(prefix=spool.value)


def sweep_spools(stale_seconds: float) -> None:
    """Removes what a process that was killed left in the temporary folder.

    Files of all spools are written to within seconds: one that was last written so long ago is nobody's.
    """
    for spool in Spool:
        for directory in Path(tempfile.gettempdir()).glob(f"{spool.value}*"):
            # Others may sweep at the same time, and may own it.
            with suppress(OSError):
                written = max(path.stat().st_mtime for path in (directory, *directory.iterdir()))
                if time.time() - written > stale_seconds:
                    shutil.rmtree(directory)
