"""Files that commands read and write: texts, lines of JSON, pictures."""

import argparse
import json
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from patchclamp.pictures.figure import SUFFIXES, MissingMatplotlib, require_matplotlib

ItemT = TypeVar("ItemT")


def parsed_file(path: str, parse: Callable[[str], ItemT]) -> ItemT:
    """Returns what `parse` makes of the text of a file. What it refuses by ValueError names the file."""
    try:
        return parse(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise argparse.ArgumentTypeError(f"{path}: {error.strerror or error}") from None
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"{path}: {error}") from None


def text_file(path: str) -> str:
    """Returns the text of a file, and refuses an empty one."""
    return parsed_file(path, not_empty)


def not_empty(text: str) -> str:
    """Returns the text of a file. Raises ValueError where there is none."""
    if not text.strip():
        raise ValueError("the file is empty")
    return text


def json_lines(path: str, parse: Callable[[dict[str, object]], ItemT], expected: str) -> list[ItemT]:
    """Returns what `parse` makes of every line that is not blank, and names the line where it raises.

    parse: refuses a line by ValueError, KeyError or TypeError.
    """
    items = []
    for number, line in enumerate(parsed_file(path, str.splitlines), start=1):
        if line.strip():
            try:
                items.append(parse(json.loads(line)))
            except (ValueError, KeyError, TypeError):
                raise argparse.ArgumentTypeError(f"{path}:{number}: expected {expected}") from None
    return items


def json_texts(path: str, kind: Callable[..., ItemT], *names: str) -> list[ItemT]:
    """Returns `kind` of the texts of these names in every line that is not blank."""
    expected = ", ".join(f'"{name}": ...' for name in names)
    return json_lines(path, lambda line: kind(*(text_of(line, name) for name in names)), f"{{{expected}}}, each a text")


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
