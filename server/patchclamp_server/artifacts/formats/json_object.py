"""JSON files of artifacts: one object, read strictly."""

import json
from pathlib import Path
from typing import Any, NoReturn

from patchclamp_server.artifacts.formats.base import MalformedFile, whole_file


def json_object(source: bytes | Path, what: str, expected: str, max_bytes: int) -> dict[str, Any]:
    """Returns the entries of a JSON object that is not empty.

    `what` names the content and `expected` shows its form, for refusals. Raises MalformedFile for a file above
    `max_bytes`, for what is not JSON (NaN and Infinity are not), for a name that stands twice, and for another value
    than an object.
    """
    data = whole_file(source, what, max_bytes)
    try:
        entries = json.loads(data, object_pairs_hook=without_duplicates, parse_constant=_no_number)
    except (ValueError, RecursionError) as error:
        raise MalformedFile(f"not JSON: {error}") from error
    if not isinstance(entries, dict) or not entries:
        raise MalformedFile(f"not {what}: expected an object {expected} that is not empty")
    return entries


def without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Returns the entries of an object, for `object_pairs_hook`. Raises ValueError for a name that stands twice."""
    entries = dict(pairs)
    if len(entries) != len(pairs):
        seen: set[str] = set()
        twice = next(name for name, _ in pairs if name in seen or seen.add(name))  # type: ignore[func-returns-value]
        raise ValueError(f"{twice!r:.80} is there twice")
    return entries


def _no_number(text: str) -> NoReturn:
    raise ValueError(f"{text} is not a number in JSON")
