"""Embeddings of tokens: rows are read where they are stored, and made float32 when they are looked up."""

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from patchclamp_server.cpu.stored import StoredMatrix


class Embedding:
    """One row [d_model] a token, of a dense matrix [vocab, d_model] or of a stored one, whose rows are float32."""

    def __init__(self, weight: Tensor | StoredMatrix) -> None:
        self.weight = weight

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
        (part,) = self.weight.parts
        # A token of a prompt is often there several times.
        wanted, places = np.unique(ids.numpy(), return_inverse=True)
        if len(wanted) and wanted[0] < 0:
            raise IndexError(f"token {wanted[0]} is below 0")
        return torch.from_numpy(part.reordered(wanted).dense()[places])
