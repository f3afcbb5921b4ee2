"""Files that commands read and write: texts, lines of JSON, pictures."""

import argparse
import json
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from patchclamp.pictures.figure import SUFFIXES, MissingMatplotlib, require_matplotlib

ItemT = TypeVar("ItemT")


def text_file(path: str) -> str:
    """Returns the text of a file, and refuses an empty one."""
    try:
        text = Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise argparse.ArgumentTypeError(f"{path}: {error}") from None
    if not text.strip():
        raise argparse.ArgumentTypeError(f"{path}: the file is empty")
    return text


def json_lines(path: str, parse: Callable[[dict[str, object]], ItemT], expected: str) -> list[ItemT]:
    """Returns what `parse` makes of every line that is not blank, and names the line where it raises.

    parse: refuses a line by ValueError, KeyError or TypeError.
    """
    items = []
    try:
        lines = Path(path).read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise argparse.ArgumentTypeError(f"{path}: {error}") from None
    for number, line in enumerate(lines, start=1):
        if line.strip():
            try:
                items.append(parse(json.loads(line)))
            except (ValueError, KeyError, TypeError):
                raise argparse.ArgumentTypeError(f"{path}:{number}: expected {expected}") from None
    return items


def text_of(fields: dict[str, object], name: str) -> str:
    """Returns a field that has to be a text. Raises KeyError or ValueError when it is not."""
    value = fields[name]
    if not isinstance(value, str):
        raise ValueError(f"{name} is no text")
    return value


def picture_file(path: str) -> Path:
    """Returns where a picture can be written: it is asked before the work that it will show, which may take long."""
    file = Path(path)
    if file.suffix not in SUFFIXES:
        raise argparse.ArgumentTypeError(f"{path}: expected a name that ends in {', '.join(SUFFIXES)}")
    if not file.parent.is_dir():
        raise argparse.ArgumentTypeError(f"{path}: there is no directory {file.parent}")
    try:
        require_matplotlib()
    except MissingMatplotlib as error:
        raise argparse.ArgumentTypeError(str(error)) from None
    return file
