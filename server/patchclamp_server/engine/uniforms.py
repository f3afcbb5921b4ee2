"""The uniform numbers that tokens are drawn with depend on a seed and on how many were drawn, and on nothing else."""

import numpy as np

# A block of Philox-4x64 has so many words of 64 bits. The first of each is used.
_WORDS = 4


def uniform(seed: int, drawn: int) -> float:
    """Returns a uniform number in [0, 1) with 53 bits: Philox-4x64 (Salmon et al. 2011), key `seed`, block `drawn`."""
    return _uniforms(seed, drawn, 1)[0]


class Uniforms:
    """Returns the numbers `uniform` of one seed. It makes several at a time, since setting the generator up takes
    longer than using it."""

    AT_ONCE = 32

    def __init__(self, seed: int) -> None:
        self._seed = seed
        self._first = 0
        self._numbers: list[float] = []

    def at(self, drawn: int) -> float:
        place = drawn - self._first
        if not 0 <= place < len(self._numbers):
            self._numbers, self._first, place = _uniforms(self._seed, drawn, self.AT_ONCE), drawn, 0
        return self._numbers[place]


def _uniforms(seed: int, first: int, n: int) -> list[float]:
    raw = np.random.Philox(key=seed, counter=first).random_raw(_WORDS * n)
    numbers: list[float] = ((raw[::_WORDS] >> np.uint64(11)) * 2.0**-53).tolist()
    return numbers
