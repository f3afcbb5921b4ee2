"""The files of one GGUF model: one, or the parts NAME-00001-of-00003.gguf, ... that llama.cpp splits large ones into.

The first part has the keys of the model; each has tensors of its own.
"""

import re
from collections.abc import Sequence
from pathlib import Path

from patchclamp_server.model.errors import ModelSourceError
from patchclamp_server.model.gguf.header import Entry, Header, read_header

PART = re.compile(r"(?P<name>.+)-(?P<part>\d{5})-of-(?P<parts>\d{5})", re.DOTALL)
_SHOWN = 5


def files_of(path: Path) -> tuple[str, tuple[Path, ...]]:
    """Returns the name of the model of which `path` is the file or one of the parts, and all its files in order.

    Raises ModelSourceError where one of the parts is not there.
    """
    match = PART.fullmatch(path.stem)
    if match is None:
        return path.stem, (path,)
    n = int(match["parts"])
    names = [f"{match['name']}-{part:05}-of-{match['parts']}{path.suffix}" for part in range(1, n + 1)]
    files = tuple(path.with_name(name) for name in names)
    if missing := [file.name for file in files if not file.is_file()]:
        more = f" and {len(missing) - _SHOWN} more" if len(missing) > _SHOWN else ""
        raise ModelSourceError(
            f"{path} is part of a split model that lacks {', '.join(missing[:_SHOWN])}{more} beside it"
        )
    if path not in files:
        raise ModelSourceError(f"{path} names itself part {int(match['part'])} of {n}")
    return match["name"], files


def read_headers(files: Sequence[Path]) -> Header:
    """Returns the header of the first file with the tensors of all. Raises ModelSourceError for files that are not
    GGUF, are damaged, or are no parts of one model."""
    first = read_header(files[0])
    entries: dict[str, Entry] = {}
    for i, path in enumerate(files):
        header = first if i == 0 else read_header(path)
        place, count = header.values.get("split.no", 0), header.values.get("split.count", 1)
        # 0 is what a file says that was merged again.
        if (place, count or 1) != (i, len(files)):
            hint = "" if len(files) > 1 else "; parts are named NAME-00001-of-00002.gguf and lie side by side"
            raise ModelSourceError(
                f"{path} says that it is part {place + 1} of {count}, not {i + 1} of {len(files)}{hint}"
            )
        for name, entry in header.entries.items():
            if name in entries:
                raise ModelSourceError(f"{path} has the tensor {name}, which another part has too")
            entries[name] = entry
    return Header(first.path, first.values, entries, first.metadata)
