"""This checks after loading that every parameter came from the files, and that every tensor of the files was used."""

import logging
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel
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


def refuse_unloaded(source: Path, model: PreTrainedModel, loading: dict[str, Any]) -> None:
    """Raises ModelSourceError for weights that are missing, of another shape, or of no use to the model.

    transformers fills what a checkpoint lacks with random numbers and drops what it does not know; both give another
    model than the one named. It leaves out of `loading` what its own table calls harmless, such as old buffers.
    """
    kind = type(model).__name__
    if missing := loading["missing_keys"]:
        raise ModelSourceError(f"{source} lacks {len(missing)} weights of a {kind}: {_shown(missing)}")
    if mismatched := loading["mismatched_keys"]:
        shapes = [f"{name} {list(found)} for {list(wanted)}" for name, found, wanted in mismatched]
        raise ModelSourceError(f"{source} has weights of other shapes than a {kind}: {_shown(shapes)}")
    if unexpected := loading["unexpected_keys"]:
        raise ModelSourceError(f"{source} has {len(unexpected)} weights that a {kind} lacks: {_shown(unexpected)}")
    if broken := loading.get("error_msgs"):
        raise ModelSourceError(f"{source} cannot be loaded: {_shown(broken)}")


def _shown(names: Iterable[str]) -> str:
    ordered = sorted(names)
    return ", ".join(ordered[:SHOWN]) + (" …" if len(ordered) > SHOWN else "")
