"""File formats of autoencoders, by name. A new format is a module in this package and a line below."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from patchclamp_server.artifacts.row_formats.base import Beside, Opened, RowFormat
from patchclamp_server.artifacts.row_formats.gemma_scope import open_gemma_scope
from patchclamp_server.artifacts.row_formats.saelens import open_saelens, write_saelens
from patchclamp_server.artifacts.tensor_file import open_tensor_file


@contextmanager
def open_safetensors(path: Path, beside: Beside) -> Iterator[Opened]:
    """A file with the names of the kind: what it is stands in its own metadata, or in what was sent beside it."""
    with open_tensor_file(path) as file:
        provenance = {} if beside.layer is None else {"layer": beside.layer}
        yield Opened(file, beside.site, provenance, file.metadata)


ROW_FORMATS = {
    f.name: f
    for f in (
        # What is stored is written as it is.
        RowFormat("safetensors", open_safetensors),
        RowFormat("saelens", open_saelens, write_saelens),
        RowFormat("gemma_scope_npz", open_gemma_scope),
    )
}

__all__ = ["ROW_FORMATS", "Beside", "Opened", "RowFormat"]
