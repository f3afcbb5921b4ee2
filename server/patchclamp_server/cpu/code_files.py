"""The files in which numba keeps compiled code, for processes that start at once, crash, or fill the disk.

numba numbers the code of one function by the signatures and closures that its index has. Two processes that read the
index at once take the same number, and one then runs what was compiled for the other: for another format of weights.
"""

# numba has no types.
# mypy: disable-error-code="no-untyped-call"

import logging
import pickle
from functools import cache
from typing import Any
from uuid import uuid4

from numba.core import caching
from numba.core.caching import IndexDataCacheFile

logger = logging.getLogger(__name__)


class _CodeFiles(IndexDataCacheFile):
    """An index whose entries have names of their own. What cannot be read is compiled again."""

    def _data_name(self, number: int) -> str:
        return str(super()._data_name(uuid4().int))

    def save(self, key: Any, data: Any) -> None:
        try:
            super().save(key, data)
        except OSError as error:
            _say_once(f"{self._cache_path}: {error.strerror or error}")

    def load(self, key: Any) -> Any:
        return _unpickled(super().load, key)

    def _load_index(self) -> Any:
        return _unpickled(super()._load_index) or {}


def _unpickled(load: Any, *arguments: Any) -> Any:
    """Returns what is loaded, or None: a machine that went down may have left half a file, or an empty one."""
    try:
        return load(*arguments)
    except (pickle.UnpicklingError, EOFError, ValueError, IndexError, KeyError, TypeError, AttributeError, ImportError):
        return None


@cache
def _say_once(reason: str) -> None:
    logger.warning("compiled code cannot be kept, and is compiled at every start: %s", reason)


def share_files() -> None:
    """Lets numba keep the code of functions that are defined from now on in such files."""
    caching.IndexDataCacheFile = _CodeFiles  # type: ignore[misc]
