"""Embeddings of tokens: rows are read where they are stored, and made float32 when they are looked up."""

from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from patchclamp_server.cpu.stored import StoredMatrix

if TYPE_CHECKING:
    from patchclamp_server.cpu.products import StoredProduct


class Embedding:
    """One row [d_model] a token, of a dense matrix [vocab, d_model] or of a stored one, whose rows are float32."""

    def __init__(self, weight: Tensor | StoredMatrix) -> None:
        self.weight = weight
        self._stored = _product(weight) if isinstance(weight, StoredMatrix) else None

    @property
    def device(self) -> torch.device:
        return self.weight.device if isinstance(self.weight, Tensor) else torch.device("cpu")

    @property
    def dtype(self) -> torch.dtype:
        return self.weight.dtype if isinstance(self.weight, Tensor) else torch.float32

    def rows(self, ids: Tensor) -> Tensor:  # [T] int64 -> [T, d_model]
        """Returns the rows of tokens. IndexError: there is no such token."""
        if isinstance(self.weight, Tensor):
            return F.embedding(ids, self.weight)
        assert self._stored is not None
        return self._stored.rows(ids)


def _product(matrix: StoredMatrix) -> "StoredProduct":
    # Only this path needs what numba compiles.
    from patchclamp_server.cpu.products import StoredProduct

    return StoredProduct(matrix)
