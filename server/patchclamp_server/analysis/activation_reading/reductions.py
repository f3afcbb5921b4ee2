"""What becomes of the rows of the tokens in scope: all rows, one for each text, or sums over all texts.

    none                   every row
    first, last            the row of the first or last token in scope of each text
    mean, sum              Σ x / n, Σ x over the n tokens in scope of each text
    max                    max x of every unit over these, and the position where it stands
    moments                mean and covariance over the tokens in scope of all texts, of n and not n - 1
    mean_by_label          Σ x / n over the tokens in scope of the texts of each label

Reducers take the rows while the engine runs the texts; sums are of float64.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from enum import Enum

import numpy as np
import torch
from torch import Tensor

from patchclamp_server.analysis.activation_reading.pieces import Choose, Piece, every, first, last
from patchclamp_server.analysis.activation_reading.rows import Place, Rows, in_type
from patchclamp_server.engine.reducers.kept_rows import KeptRows
from patchclamp_server.engine.reducers.largest_rows import LargestRows
from patchclamp_server.engine.reducers.reducer import Reducer
from patchclamp_server.engine.reducers.sums import Sums
from patchclamp_server.model.sites import Site


class Reduce(Enum):
    NONE = "none"
    FIRST = "first"
    LAST = "last"
    MEAN = "mean"
    SUM = "sum"
    MAX = "max"
    MOMENTS = "moments"
    MEAN_BY_LABEL = "mean_by_label"

    @property
    def of_all_texts(self) -> bool:
        return self in (Reduce.MOMENTS, Reduce.MEAN_BY_LABEL)

    @property
    def choose(self) -> Choose:
        """Which of the tokens in scope have to be read."""
        return {Reduce.FIRST: first, Reduce.LAST: last}.get(self, every)


# Of a reduction that makes one row of many: by site, a reducer of one piece of a text.
_OF_TEXT: dict[Reduce, Callable[[tuple[int, ...]], Reducer]] = {
    Reduce.MEAN: Sums,
    Reduce.SUM: Sums,
    Reduce.MAX: LargestRows,
}


def reducer_of_piece(reduce: Reduce, layers: tuple[int, ...]) -> Reducer:
    return _OF_TEXT.get(reduce, KeptRows)(layers)


def rows_of_piece(piece: Piece, kept: dict[Site, KeptRows], dtype: torch.dtype) -> Rows:
    """Returns the rows that a piece left."""
    n = int(piece.chosen.sum())
    values = {
        (site, layer): in_type(reducer.rows(layer), dtype) for site, reducer in kept.items() for layer in reducer.layers
    }
    return Rows(
        np.full(n, piece.text),
        np.full(n, piece.label),
        piece.positions,
        piece.token_ids,
        np.ones(n, dtype=np.int64),
        np.full(n, piece.length),
        values,
        {},
    )


@dataclass(eq=False)
class TextSoFar:
    """One text of which several pieces become one row."""

    reduce: Reduce
    piece: Piece
    tokens: int = 0
    # By site and layer: sums in float64; or maxima in float32 and where they stand.
    values: dict[Place, Tensor] = field(default_factory=dict)
    at: dict[Place, Tensor] = field(default_factory=dict)

    def add(self, piece: Piece, reducers: dict[Site, Reducer]) -> None:
        """Takes the next piece of the text."""
        self.piece = piece
        self.tokens += int(piece.chosen.sum())
        positions = torch.from_numpy(piece.positions)
        for site, reducer in reducers.items():
            for layer in reducer.layers:
                if isinstance(reducer, Sums):
                    total = reducer.sum(layer).cpu()
                    before = self.values.get((site, layer))
                    self.values[site, layer] = total if before is None else before + total
                elif isinstance(reducer, LargestRows):
                    values, rows = (found.cpu() for found in reducer.largest(layer))
                    self._larger((site, layer), values, positions[rows])

    def _larger(self, place: Place, values: Tensor, at: Tensor) -> None:
        if place in self.values:
            is_larger = values > self.values[place]
            values = torch.where(is_larger, values, self.values[place])
            at = torch.where(is_larger, at, self.at[place])
        self.values[place], self.at[place] = values, at

    def row(self, dtype: torch.dtype) -> Rows:
        """Returns the row of the text, which is over. It stands at the last token in scope."""
        divisor = self.tokens if self.reduce is Reduce.MEAN else 1
        piece = self.piece

        def one(number: int) -> np.ndarray:
            return np.array([number], dtype=np.int64)

        return Rows(
            one(piece.text),
            one(piece.label),
            piece.positions[-1:],
            piece.token_ids[-1:],
            one(self.tokens),
            one(piece.length),
            {place: in_type(values / divisor, dtype)[None] for place, values in self.values.items()},
            {place: at.to(torch.int32)[None] for place, at in self.at.items()},
        )
