"""File formats of autoencoders, by name. A new format is a module in this package and a line below."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from patchclamp_server.artifacts.formats.base import Beside
from patchclamp_server.artifacts.formats.tensor_names import check_foreign, left_out, listed, refused
from patchclamp_server.artifacts.row_formats.base import Opened, RenamedRows, RowFormat, Source
from patchclamp_server.artifacts.row_formats.gemma_scope import open_gemma_scope
from patchclamp_server.artifacts.row_formats.saelens import open_saelens, write_saelens
from patchclamp_server.artifacts.tensor_file import open_tensor_file


@contextmanager
def open_safetensors(path: Path, beside: Beside) -> Iterator[Opened]:
    """A file with the names of the kind, or others that tensor_names say: what it is stands in its own metadata, or in
    what was sent beside it."""
    with open_tensor_file(path) as file:
        provenance: dict[str, Any] = {} if beside.layer is None else {"layer": beside.layer}
        if not beside.tensor_names:
            yield Opened(file, beside.site, provenance, file.metadata)
            return
        check_foreign(file.metadata)
        names = dict(beside.tensor_names)
        for name, source in names.items():
            if source not in file.shapes:
                raise refused(name, f"the file has no tensor {source!r:.120}; it has {listed(file.shapes)}")
        renamed = RenamedRows(file, {name: Source(source) for name, source in names.items()})
        provenance |= {"method": "imported", "format": "safetensors", "tensor_names": names}
        yield Opened(
            renamed, beside.site, provenance, imported_from=names, warnings=left_out(file.shapes, names.values())
        )


ROW_FORMATS = {
    f.name: f
    for f in (
        # What is stored is written as it is.
        RowFormat("safetensors", open_safetensors, takes=frozenset({"tensor_names"})),
        RowFormat("saelens", open_saelens, write_saelens, takes=frozenset({"config"})),
        RowFormat("gemma_scope_npz", open_gemma_scope),
    )
}

__all__ = ["ROW_FORMATS", "Beside", "Opened", "RowFormat"]
