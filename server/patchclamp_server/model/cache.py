"""This is a cache of what is fetched or made once of other files: an entry is whole or does not exist.

An entry is built in a hidden sibling, its manifest is written last, and one rename makes it visible. A lock for each
entry keeps two processes from building the same one; the kernel releases it when its holder dies.
"""

import fcntl
import json
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from uuid import uuid4

from patchclamp_server.files import cache_root, sync
from patchclamp_server.model.digests import content_digest, rename_remembered
from patchclamp_server.model.errors import ModelSourceError
from patchclamp_server.model.progress import Progress, Stage


class CacheUnwritable(ModelSourceError):
    """An entry that is not in the cache cannot be stored there."""


MANIFEST = "patchclamp-manifest.json"


def cached_model(key: str, build: Callable[[Path], None], progress: Progress) -> Path:
    """Returns the directory of entry `key`; `build` fills an empty directory with it when there is no sound entry yet.

    An entry that does not match its manifest is thrown away and built again. What `build` raises is passed on, and
    leaves no entry. Raises CacheUnwritable where the cache cannot be written and has no such entry.
    """
    try:
        models = cache_root() / "models"
    except OSError as error:
        raise CacheUnwritable(f"there is no cache: {error}") from error
    entry = models / key
    if not is_sound(entry):
        try:
            models.mkdir(parents=True, exist_ok=True)
            with _locked(models / f".{key}.lock", progress):
                # The previous holder of the lock may have built it.
                if not is_sound(entry):
                    _discard(models, key)
                    _build(models, key, build)
        except OSError as error:
            raise CacheUnwritable(
                f"the cache {models} cannot be written: {error}; PATCHCLAMP_CACHE names another directory"
            ) from error
    return entry


def is_sound(entry: Path) -> bool:
    """Returns whether the files match the manifest, by size and digest (remembered while a file is unchanged)."""
    try:
        listed = json.loads((entry / MANIFEST).read_bytes())["files"]
        for name, expected in listed.items():
            path = entry / name
            if path.stat().st_size != expected["size"] or content_digest(path) != expected["digest"]:
                return False
    except (OSError, ValueError, KeyError, TypeError, AttributeError, ModelSourceError):
        # A damaged entry can look like any of these: no manifest, an unreadable one, no JSON, or another shape.
        return False
    return bool(listed)


def _build(models: Path, key: str, build: Callable[[Path], None]) -> None:
    partial = _hidden(models, key)
    partial.mkdir()
    try:
        build(partial)
        files = sorted(path for path in partial.iterdir() if path.is_file())
        for path in files:
            # safetensors creates files for their owner only; an entry gets the rights of the user's umask.
            path.chmod(partial.stat().st_mode & 0o666)
            sync(path)
        manifest = {path.name: {"size": path.stat().st_size, "digest": content_digest(path)} for path in files}
        (partial / MANIFEST).write_text(json.dumps({"files": manifest}, indent=1))
        sync(partial / MANIFEST)
        sync(partial)
        partial.rename(models / key)
        sync(models)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    for path in files:
        rename_remembered(path.resolve(), (models / key / path.name).resolve())


def _discard(models: Path, key: str) -> None:
    """Removes a damaged entry and what killed builders left. It must only be called under the lock."""
    for leftover in models.glob(f".{key}.*.partial"):
        shutil.rmtree(leftover)
    if (models / key).exists():
        # The entry is renamed first, so that no reader sees it half removed.
        grave = _hidden(models, key)
        (models / key).rename(grave)
        shutil.rmtree(grave)


def _hidden(models: Path, key: str) -> Path:
    return models / f".{key}.{uuid4().hex}.partial"


@contextmanager
def _locked(path: Path, progress: Progress) -> Iterator[None]:
    with path.open("a") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            progress.update(Stage.WAIT)
            fcntl.flock(file, fcntl.LOCK_EX)
        yield
