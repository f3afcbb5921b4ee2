"""Gives out the rows of a growing table in runs."""


class Ranges:
    """First-fit allocation of consecutive rows. `capacity` doubles when nothing fits."""

    def __init__(self, capacity: int) -> None:
        self.capacity = capacity
        # These are the free runs (first, length), ascending; no two of them are adjacent.
        self._free = [(0, capacity)]

    def acquire(self, n: int) -> int:
        """Returns the first of n consecutive rows, or 0 where n is 0."""
        if not n:
            return 0
        while True:
            for i, (first, length) in enumerate(self._free):
                if length >= n:
                    self._free[i : i + 1] = [(first + n, length - n)] if length > n else []
                    return first
            self._grow()

    def release(self, first: int, n: int) -> None:
        if not n:
            return
        merged: list[tuple[int, int]] = []
        for start, length in sorted([*self._free, (first, n)]):
            if merged and sum(merged[-1]) == start:
                merged[-1] = (merged[-1][0], merged[-1][1] + length)
            else:
                merged.append((start, length))
        self._free = merged

    def _grow(self) -> None:
        self.capacity *= 2
        self.release(self.capacity // 2, self.capacity // 2)
