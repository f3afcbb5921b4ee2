"""Banks hold the vectors that the tables name: a row number of the bank of the vector's width."""

import torch
from torch import Tensor

# This row of every bank is always zero. It pads what is shorter than the longest of its kind.
ZERO_ROW = 0


class VectorBank:
    """Holds vectors of one width, [capacity, width]. The capacity doubles when no row is free."""

    def __init__(self, width: int, dtype: torch.dtype, device: torch.device, capacity: int) -> None:
        self.data = torch.zeros((capacity, width), dtype=dtype, device=device)
        self._free = list(range(capacity - 1, ZERO_ROW, -1))

    def store(self, vectors: Tensor) -> list[int]:  # [n, width]
        while len(self._free) < len(vectors):
            old = len(self.data)
            self.data = torch.cat((self.data, torch.zeros_like(self.data)))
            self._free.extend(range(2 * old - 1, old - 1, -1))
        # Rows are taken only after they are written, so that a write that fails takes none.
        rows = self._free[len(self._free) - len(vectors) :][::-1]
        self.data[rows] = vectors.to(self.data)
        del self._free[len(self._free) - len(vectors) :]
        return rows

    def release(self, rows: list[int]) -> None:
        self._free.extend(rows)

    @property
    def n_held(self) -> int:
        return len(self.data) - 1 - len(self._free)
