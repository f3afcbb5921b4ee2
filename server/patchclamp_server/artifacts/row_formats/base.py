"""What a file format of an autoencoder provides: its tensors by rows, since none is ever whole in memory."""

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from patchclamp_server.artifacts.formats.base import Beside
from patchclamp_server.artifacts.tensor_file import TensorFile, TensorRows
from patchclamp_server.artifacts.types import ArtifactInfo, Metadata
from patchclamp_server.model.sites import Site


@dataclass(frozen=True, eq=False)
class Opened:
    """Tensors under the names of the kind, the metadata if Patchclamp wrote the file, else site and provenance."""

    tensors: TensorRows
    site: Site | None = None
    provenance: Mapping[str, Any] = field(default_factory=dict)
    metadata: Metadata | None = None
    imported_from: Mapping[str, str] = field(default_factory=dict)
    warnings: tuple[str, ...] = ()


@dataclass(frozen=True)
class RowFormat:
    """`open` raises MalformedFile for the file, and InvalidArgument with a name of UploadHeader for what is beside it.

    `write` makes a file of an artifact and returns its configuration, "" where there is none; it raises CannotExpress.
    `takes` names the fields of Beside that it uses, but for the place and what is known of the model.
    """

    name: str
    open: Callable[[Path, Beside], AbstractContextManager[Opened]]
    write: Callable[[ArtifactInfo, TensorFile, Path], str] | None = None
    takes: frozenset[str] = frozenset()


@dataclass(frozen=True, eq=False)
class Source:
    """A tensor of a file: as it is, or transposed; and each row times a number of `scale` float32 [rows]."""

    name: str
    transposed: bool = False
    scale: Tensor | None = None


class RenamedRows:
    """The tensors of a file under other names. A transposed one must be a matrix."""

    def __init__(self, file: TensorFile, sources: Mapping[str, Source]) -> None:
        self._file, self._sources = file, sources
        self._shapes = {
            name: file.shapes[source.name][::-1] if source.transposed else file.shapes[source.name]
            for name, source in sources.items()
        }

    @property
    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        return self._shapes

    @property
    def dtypes(self) -> Mapping[str, torch.dtype]:
        return {name: self._file.dtypes[source.name] for name, source in self._sources.items()}

    def rows(self, name: str, start: int, end: int) -> Tensor:
        source = self._sources[name]
        found = (self._file.columns if source.transposed else self._file.rows)(source.name, start, end)
        if source.scale is None:
            return found
        scale = source.scale[start:end].view(-1, *(1 for _ in found.shape[1:]))
        return (found.float() * scale).to(found.dtype)
