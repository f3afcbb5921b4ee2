"""Rows of stored activations, read a text, site and layer at a time, without the rest of their file."""

from dataclasses import dataclass

import numpy as np
from torch import Tensor

from patchclamp_server.artifacts.activations import places_of, tensor_name
from patchclamp_server.artifacts.corpora import label_names
from patchclamp_server.artifacts.tensor_file import TensorFile
from patchclamp_server.artifacts.types import ArtifactInfo, ArtifactKind
from patchclamp_server.errors import FailedPrecondition, NotFound
from patchclamp_server.model.sites import Site


@dataclass(frozen=True, eq=False)
class TextRows:
    """Rows `first` to `end` of an artifact, which are of one text: positions and tokens int64 [rows], ascending by
    position, of a text of `length` tokens."""

    first: int
    end: int
    positions: Tensor
    tokens: Tensor
    length: int


class StoredActivations:
    """Those of ArtifactStore.open. FailedPrecondition: another kind of artifact."""

    def __init__(self, info: ArtifactInfo, file: TensorFile) -> None:
        if info.kind is not ArtifactKind.ACTIVATIONS:
            raise FailedPrecondition("", f"{info.id} is a {info.kind.value}, not activations")
        self.info = info
        self.labels = label_names(info.provenance)
        self._file = file
        # The width of each site and layer that there are rows of.
        self.widths = places_of(file.shapes)
        self._texts = file.tensor("text").numpy()

    def texts(self) -> list[int]:
        """Texts that have a row, ascending."""
        return [int(text) for text in np.unique(self._texts)]

    def rows_of(self, text: int) -> TextRows:
        """NotFound: no row of that text."""
        first, end = (int(np.searchsorted(self._texts, text, side=side)) for side in ("left", "right"))
        if first == end:
            raise NotFound("", f"{self.info.id} has no row of text {text}; it has rows of {_some(self.texts())}")
        positions, tokens = (self._file.rows(name, first, end) for name in ("position", "token"))
        return TextRows(first, end, positions, tokens, int(self._file.rows("length", first, first + 1)))

    def values(self, site: Site, layer: int, rows: TextRows) -> Tensor:
        """Returns [rows, width] as they are stored. NotFound: the artifact has no rows of this site and layer."""
        if (site, layer) not in self.widths:
            there = _some([tensor_name(*place) for place in self.widths])
            raise NotFound("", f"{self.info.id} has no rows of {tensor_name(site, layer)}; it has {there}")
        return self._file.rows(tensor_name(site, layer), rows.first, rows.end)


def _some(found: list[str] | list[int]) -> str:
    return ", ".join(map(str, found[:8])) + (f" and {len(found) - 8} more" if len(found) > 8 else "")
