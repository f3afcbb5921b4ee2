"""This checks after loading that every parameter came from the files, and that every tensor of the files was used."""

import logging
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from transformers.utils import logging as transformers_logging

from patchclamp_server.model.errors import ModelSourceError

SHOWN = 5


@contextmanager
def without_load_report() -> Iterator[None]:
    """Keeps transformers from printing a table of what it did not find: `refuse_unloaded` names it in one line."""
    before = transformers_logging.get_verbosity()
    transformers_logging.set_verbosity(logging.ERROR)
    try:
        yield
    finally:
        transformers_logging.set_verbosity(before)


def refuse_unloaded(
    source: Path,
    kind: str,
    missing: Iterable[str],
    mismatched: Iterable[tuple[str, Iterable[int], Iterable[int]]],
    unexpected: Iterable[str],
) -> None:
    """Raises ModelSourceError for weights that are missing, of another shape, or of no use to a model of this kind.

    Filling what a checkpoint lacks and dropping what is not known both give another model than the one named.
    """
    if missing := list(missing):
        raise ModelSourceError(f"{source} lacks {len(missing)} weights of a {kind}: {_shown(missing)}")
    if mismatched := list(mismatched):
        shapes = [f"{name} {list(found)} for {list(wanted)}" for name, found, wanted in mismatched]
        raise ModelSourceError(f"{source} has weights of other shapes than a {kind}: {_shown(shapes)}")
    if unexpected := list(unexpected):
        raise ModelSourceError(f"{source} has {len(unexpected)} weights that a {kind} lacks: {_shown(unexpected)}")


def refuse_unloaded_by_transformers(source: Path, kind: str, loading: dict[str, Any]) -> None:
    """The same for what transformers says of its loading. It leaves out what its own table calls harmless."""
    refuse_unloaded(source, kind, loading["missing_keys"], loading["mismatched_keys"], loading["unexpected_keys"])
    if broken := loading.get("error_msgs"):
        raise ModelSourceError(f"{source} cannot be loaded: {_shown(broken)}")


def _shown(names: Iterable[str]) -> str:
    ordered = sorted(names)
    return ", ".join(ordered[:SHOWN]) + (" …" if len(ordered) > SHOWN else "")
