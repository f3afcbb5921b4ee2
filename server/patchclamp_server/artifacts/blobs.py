"""A blob store keeps named bytes in a directory or at any fsspec URL; they are written whole or not at all."""

import errno
import logging
import os
import uuid
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import IO

from fsspec.core import url_to_fs
from fsspec.implementations.local import LocalFileSystem

from patchclamp_server.errors import ResourceExhausted
from patchclamp_server.files import make_directories, sync, write_synced

log = logging.getLogger(__name__)
TEMPORARY = "tmp"
STALE_AFTER = timedelta(hours=1)
# File systems without hard links raise one of these.
NO_LINKS = (errno.EPERM, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS, errno.EMLINK)
# These mean: no space, no quota, and a file above the limit of the process.
FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


class BlobStore:
    """Paths are relative to the root and use '/'. Missing paths raise FileNotFoundError.

    A write goes to tmp/<random> first and is then moved to its name; on a local disk the file and its directory are
    synced, so after a crash the name holds the old bytes or the new bytes. Temporary files that a crash left are
    removed on start once they are an hour old: a younger one may belong to another process that is writing now.
    """

    def __init__(self, url: str | Path) -> None:
        self.fs, root = url_to_fs(str(url))
        self.root = str(root).rstrip("/")
        self.local = isinstance(self.fs, LocalFileSystem)
        self.fs.makedirs(f"{self.root}/{TEMPORARY}", exist_ok=True)
        self._sweep()

    def read(self, path: str) -> bytes:
        return bytes(self.fs.cat_file(self._full(path)))

    def read_range(self, path: str, start: int, end: int) -> bytes:
        return bytes(self.fs.cat_file(self._full(path), start=start, end=end))

    def stat(self, path: str) -> tuple[int, float]:
        """Returns the size in bytes, and the time of writing in seconds since the epoch."""
        full = self._full(path)
        return int(self.fs.size(full)), float(self.fs.modified(full).timestamp())

    def names(self, directory: str) -> list[str]:
        """Returns the paths below a directory, relative to it and sorted; none where the directory does not exist."""
        prefix = self._full(directory)
        self.fs.invalidate_cache()
        found = self.fs.find(prefix)
        return sorted(str(name).removeprefix(prefix + "/") for name in found)

    def read_all(self, directory: str) -> dict[str, bytes]:
        """Returns everything directly below a directory by name; what vanishes meanwhile is left out."""
        contents = {}
        for name in self.names(directory):
            with suppress(FileNotFoundError):
                contents[name] = self.read(f"{directory}/{name}")
        return contents

    def write(self, path: str, data: bytes) -> None:
        """Replaces the bytes at a path in one step. Raises ResourceExhausted when there is no room."""
        self.write_all({path: data})

    def write_all(self, contents: Mapping[str, bytes]) -> None:
        """Writes several paths in their order, each as `write` does, but none before there is room for all of them."""
        temporary = {path: self._full(f"{TEMPORARY}/{uuid.uuid4().hex}") for path in contents}
        with full_disk_is_resource_exhausted("the artifact store"):
            try:
                for path, data in contents.items():
                    if self.local:
                        write_synced(Path(temporary[path]), data)
                        make_directories(Path(self._full(path)).parent)
                    else:
                        self.fs.pipe_file(temporary[path], data)
                        self.fs.makedirs(self._full(path).rpartition("/")[0], exist_ok=True)
                for path in contents:
                    final = self._full(path)
                    if self.local:
                        os.replace(temporary[path], final)
                        sync(Path(final).parent)
                    else:
                        self.fs.mv(temporary[path], final)
            finally:
                for name in temporary.values():
                    with suppress(FileNotFoundError):
                        self.fs.rm_file(name)

    @contextmanager
    def unfinished(self) -> Iterator["UnfinishedBlob"]:
        """A blob that is written in pieces and has no name before `keep`; without it, it is gone at the end. Raises
        ResourceExhausted when there is no room."""
        name = self._full(f"{TEMPORARY}/{uuid.uuid4().hex}")
        with full_disk_is_resource_exhausted("the artifact store"):
            try:
                with self.fs.open(name, "wb") as file:
                    blob = UnfinishedBlob(self, name, file)
                    yield blob
            finally:
                with suppress(FileNotFoundError):
                    self.fs.rm_file(name)

    def create(self, path: str, data: bytes) -> None:
        """Writes a path that does not exist yet. Of several callers that create it at once, one succeeds and the others
        get FileExistsError. A file system without such an operation is asked first, and there the last one wins. Raises
        ResourceExhausted when there is no room."""
        full = self._full(path)
        with full_disk_is_resource_exhausted("the artifact store"):
            if self.local:
                self._create_locally(full, data)
                return
            self.fs.makedirs(full.rpartition("/")[0], exist_ok=True)
            try:
                self.fs.pipe_file(full, data, mode="create")
            except (NotImplementedError, ValueError):
                self._refuse_existing(full)
                self.fs.pipe_file(full, data)

    def _create_locally(self, full: str, data: bytes) -> None:
        temporary = self._full(f"{TEMPORARY}/{uuid.uuid4().hex}")
        write_synced(Path(temporary), data)
        try:
            make_directories(Path(full).parent)
            try:
                os.link(temporary, full)
            except OSError as error:
                if error.errno not in NO_LINKS:
                    raise
                self._refuse_existing(full)
                os.replace(temporary, full)
            sync(Path(full).parent)
        finally:
            with suppress(FileNotFoundError):
                os.remove(temporary)

    def _refuse_existing(self, full: str) -> None:
        self.fs.invalidate_cache()
        if self.fs.exists(full):
            raise FileExistsError(errno.EEXIST, "there is one already", full)

    def remove(self, path: str) -> None:
        self.fs.rm_file(self._full(path))

    def _full(self, path: str) -> str:
        return f"{self.root}/{path}"

    def _sweep(self) -> None:
        for name in self.names(TEMPORARY):
            full = self._full(f"{TEMPORARY}/{name}")
            # Another process may sweep at the same time.
            with suppress(FileNotFoundError):
                if datetime.now(UTC) - self.fs.modified(full).astimezone(UTC) > STALE_AFTER:
                    self.fs.rm_file(full)
                    log.info("removed the unfinished write %s", full)


@dataclass(frozen=True, eq=False)
class UnfinishedBlob:
    store: BlobStore
    name: str
    file: IO[bytes]

    def write(self, data: bytes) -> None:
        self.file.write(data)

    def keep(self, path: str) -> None:
        """Gives the blob its name, in place of what had it; nothing can be written any more."""
        store, final = self.store, self.store._full(path)
        if store.local:
            self.file.flush()
            os.fsync(self.file.fileno())
        self.file.close()
        if store.local:
            make_directories(Path(final).parent)
            os.replace(self.name, final)
            sync(Path(final).parent)
        else:
            store.fs.makedirs(final.rpartition("/")[0], exist_ok=True)
            store.fs.mv(self.name, final)


@contextmanager
def full_disk_is_resource_exhausted(place: str) -> Iterator[None]:
    """Turns the error of a full disk (or quota) into ResourceExhausted; lets other errors pass."""
    try:
        yield
    except OSError as error:
        if error.errno in FULL:
            raise ResourceExhausted("", f"{place} is full: {error.strerror}") from error
        raise
