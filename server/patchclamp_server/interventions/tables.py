"""Device tables that live across steps: receipt counters and latches of all running programs."""

import numpy as np
import torch

NEVER = torch.iinfo(torch.int64).max


class Tables:
    """One row for each edit of each running program. Rows are given out at admission and returned at the end."""

    def __init__(self, device: torch.device, capacity: int = 1024) -> None:
        # Rows edited, and the sum of |delta| / |h| over them.
        self.counts = torch.zeros((capacity, 2), dtype=torch.float64, device=device)
        # Position at which the latch of the edit fired first.
        self.latch = torch.full((capacity,), NEVER, dtype=torch.int64, device=device)
        self._free = list(range(capacity - 1, -1, -1))

    def acquire(self, n: int) -> list[int]:
        """`n` cleared rows."""
        while len(self._free) < n:
            self._grow()
        rows = [self._free.pop() for _ in range(n)]
        if rows:
            self.counts[rows] = 0.0
            self.latch[rows] = NEVER
        return rows

    def release(self, rows: list[int]) -> None:
        self._free.extend(rows)

    def read(self, rows: list[int]) -> np.ndarray:
        """Counts [n, 2] of the rows."""
        counts: np.ndarray = self.counts[rows].cpu().numpy()
        return counts

    def _grow(self) -> None:
        old = self.counts.shape[0]
        self.counts = torch.cat((self.counts, torch.zeros_like(self.counts)))
        self.latch = torch.cat((self.latch, torch.full_like(self.latch, NEVER)))
        self._free.extend(range(2 * old - 1, old - 1, -1))
