"""Rows as an activations artifact: written to files as they come, one for each tensor, and stored from there.

In memory are the rows that are written at the moment, whatever comes together.
"""

from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import torch
from torch import Tensor

from patchclamp_server.analysis.activation_reading.rows import Place, Rows
from patchclamp_server.artifacts.activations import tensor_name
from patchclamp_server.artifacts.blobs import full_disk_is_resource_exhausted
from patchclamp_server.artifacts.store import ArtifactStore
from patchclamp_server.artifacts.types import ArtifactInfo, ArtifactKind, Tags
from patchclamp_server.errors import InvalidArgument
from patchclamp_server.files import Spool, spool_directory

# Beyond that nobody reads it as a whole: there is a corpus to be reduced.
MAX_STORED_BYTES = 8 << 30
# The tensors of the artifact by the fields of Rows.
_INDICES = {"text": "texts", "position": "positions", "token": "token_ids", "length": "lengths"}


class StoredRows:
    """Rows of one call. As a context manager it removes its files."""

    def __init__(self, dtype: torch.dtype, *, labelled: bool) -> None:
        self._dtype = dtype
        self._indices = _INDICES | ({"label": "labels"} if labelled else {})
        self._directory = spool_directory(Spool.ACTIVATIONS)
        self._widths: dict[Place, int] = {}
        self._bytes = 0
        self.n_rows = 0

    def __enter__(self) -> "StoredRows":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._directory.cleanup()

    def add(self, rows: Rows) -> None:
        """Raises InvalidArgument on "store" for more than an artifact holds, and ResourceExhausted without room."""
        self._bytes += rows.bytes
        if self._bytes > MAX_STORED_BYTES:
            message = f"more than {MAX_STORED_BYTES} bytes of rows; choose fewer texts, tokens, sites or layers"
            raise InvalidArgument("store", message)
        with full_disk_is_resource_exhausted("the space for rows"):
            for name, of in self._indices.items():
                self._append(name, getattr(rows, of).astype(np.int64).tobytes())
            for place, values in rows.values.items():
                self._widths[place] = values.shape[1]
                self._append(tensor_name(*place), values.contiguous().view(torch.uint8).numpy().tobytes())
        self.n_rows += len(rows)

    def _append(self, name: str, data: bytes) -> None:
        with self._path(name).open("ab") as file:
            file.write(data)

    def _path(self, name: str) -> Path:
        return Path(self._directory.name) / name

    def put(
        self,
        store: ArtifactStore,
        fingerprint: str,
        *,
        provenance: Mapping[str, Any],
        evidence: Mapping[str, Any],
        description: str,
        tags: Tags,
    ) -> ArtifactInfo:
        """Stores what has come, one row at least. Raises what ArtifactStore.put does."""
        tensors = {name: self._mapped(name, torch.int64, (self.n_rows,)) for name in self._indices}
        for place, width in self._widths.items():
            name = tensor_name(*place)
            tensors[name] = self._mapped(name, self._dtype, (self.n_rows, width))
        return store.put(
            ArtifactKind.ACTIVATIONS,
            tensors,
            model_fingerprint=fingerprint,
            description=description,
            provenance=provenance,
            evidence=evidence,
            tags=tags,
        )

    def _mapped(self, name: str, dtype: torch.dtype, shape: tuple[int, ...]) -> Tensor:
        # Copy on write, since torch takes no array that cannot be written to.
        return torch.from_numpy(np.memmap(self._path(name), dtype=np.uint8, mode="c")).view(dtype).view(shape)
