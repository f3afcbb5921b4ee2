"""Rows on their way to whoever asked for them: of several texts together, and in parts that fit a message."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from patchclamp_server.errors import InvalidArgument
from patchclamp_server.model.arrays import IntArray
from patchclamp_server.model.sites import Site

Place = tuple[Site, int]
INDICES = ("texts", "labels", "positions", "token_ids", "tokens", "lengths")


@dataclass(frozen=True, eq=False)
class Rows:
    """n rows, of each: its text and label, the position and id of its token, the tokens that it stands for, and those
    that its text has, int64 [n]. By site and layer: `values` [n, width], and of maxima `unit_positions` int32 alike."""

    texts: IntArray
    labels: IntArray
    positions: IntArray
    token_ids: IntArray
    tokens: IntArray
    lengths: IntArray
    values: dict[Place, Tensor]
    unit_positions: dict[Place, Tensor]

    def __len__(self) -> int:
        return len(self.texts)

    @property
    def bytes(self) -> int:
        each = (*self.values.values(), *self.unit_positions.values())
        return sum(tensor.numel() * tensor.element_size() for tensor in each)


@dataclass(frozen=True, eq=False)
class RowsOfPlace:
    """Rows of one site and layer; the other fields are as in Rows."""

    site: Site
    layer: int
    texts: IntArray
    labels: IntArray
    positions: IntArray
    token_ids: IntArray
    tokens: IntArray
    lengths: IntArray
    values: Tensor
    unit_positions: Tensor | None


def joined(parts: Sequence[Rows]) -> Rows:
    """Returns the rows of all parts, in their order."""
    if len(parts) == 1:
        return parts[0]
    indices = {name: np.concatenate([getattr(part, name) for part in parts]) for name in INDICES}
    values = {place: torch.cat([part.values[place] for part in parts]) for place in parts[0].values}
    at = {place: torch.cat([part.unit_positions[place] for part in parts]) for place in parts[0].unit_positions}
    return Rows(**indices, values=values, unit_positions=at)


def by_place(rows: Rows, most_bytes: int) -> Iterator[RowsOfPlace]:
    """Yields the rows of one place after the other, in parts of at most `most_bytes` of numbers, one row at least."""
    for (site, layer), values in rows.values.items():
        at = rows.unit_positions.get((site, layer))
        row_bytes = values.shape[1] * (values.element_size() + (0 if at is None else at.element_size()))
        n = max(1, most_bytes // row_bytes)
        for start in range(0, len(rows), n):
            own = slice(start, start + n)
            yield RowsOfPlace(
                site,
                layer,
                rows.texts[own],
                rows.labels[own],
                rows.positions[own],
                rows.token_ids[own],
                rows.tokens[own],
                rows.lengths[own],
                values[own],
                None if at is None else at[own],
            )


def in_type(values: Tensor, dtype: torch.dtype) -> Tensor:
    """Returns numbers in another type, on the CPU. InvalidArgument on "dtype" for one that is beyond it."""
    found = values.to("cpu", dtype)
    if dtype is torch.float16 and not bool(torch.isfinite(found).all()) and bool(torch.isfinite(values).all()):
        message = "an activation is beyond the largest float16, 65504; expected bfloat16 or float32"
        raise InvalidArgument("dtype", message)
    return found
