"""Where numba keeps what it compiled: a directory for each state of our sources.

numba asks only whether the file that defines a function has changed. What it calls may lie in another file, and code
for another layout of memory does not fail but crashes. So the directory is named by the bytes of every module that
takes part.
"""

import atexit
import hashlib
import os
import re
import shutil
import tempfile
import time
from contextlib import suppress
from pathlib import Path

from patchclamp_server.files import cache_root

_PACKAGE = Path(__file__).parent.parent
_COMPILES = re.compile(r"^(?:from|import) (?:numba|llvmlite)\b", re.MULTILINE)
_IMPORTS = re.compile(rf"^\s*from {_PACKAGE.name}\.([\w.]+) import", re.MULTILINE)
_KEPT_SECONDS = 30 * 24 * 3600


def keep_compiled_code() -> str:
    """Sets NUMBA_CACHE_DIR, unless the operator has, before numba is imported: the package may be read-only. Returns
    what whoever waits for a start should know, or ""."""
    said = ""
    if "NUMBA_CACHE_DIR" not in os.environ:
        os.environ["NUMBA_CACHE_DIR"], said = _directory()
    # numba reads the variable when it is imported.
    from patchclamp_server.cpu.code_files import share_files

    share_files()
    return said


def sources() -> list[Path]:
    """Returns the modules that are compiled, and those that they import from, in order."""
    texts = {path: path.read_text() for path in sorted(_PACKAGE.rglob("*.py"))}
    found = {path for path, text in texts.items() if _COMPILES.search(text)}
    for path in sorted(found):
        for name in _IMPORTS.findall(texts[path]):
            module = _PACKAGE.joinpath(*name.split("."))
            found |= {module.with_suffix(".py"), module / "__init__.py"} & texts.keys()
    return sorted(found)


def _directory() -> tuple[str, str]:
    """Returns a directory below the cache, or where that cannot be written one that is removed with this process, and
    what to say when there is nothing in it yet."""
    digest = hashlib.sha256()
    for path in sources():
        digest.update(path.relative_to(_PACKAGE).as_posix().encode() + b"\0" + path.read_bytes() + b"\0")
    try:
        root = cache_root() / "numba"
        directory = root / digest.hexdigest()[:16]
        is_new = not directory.exists()
        directory.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=directory):
            os.utime(directory)
    except OSError as error:
        temporary = tempfile.mkdtemp(prefix="patchclamp-numba-")
        atexit.register(shutil.rmtree, temporary, ignore_errors=True)
        return temporary, f"every start compiles anew, which takes a minute or more: {error}"
    _remove_unused(root)
    said = f"the first start compiles, which takes a minute or more; later ones find it in {directory}"
    return str(directory), said if is_new else ""


def _remove_unused(root: Path) -> None:
    """Removes what no process has asked for in a month, that of older versions among it."""
    before = time.time() - _KEPT_SECONDS
    for other in root.iterdir():
        with suppress(OSError):
            if other.is_dir() and other.stat().st_mtime < before:
                shutil.rmtree(other, ignore_errors=True)
