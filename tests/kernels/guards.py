"""Buffers that show what a kernel must not do: read what nobody wrote, or write beyond an end."""

import torch
from torch import Tensor

MARGIN = 512
_CANARY = 0x5A


class Guarded:
    """A contiguous tensor between two canary margins. Integers start as a large bogus number, floats as NaN."""

    def __init__(self, shape: tuple[int, ...], dtype: torch.dtype) -> None:
        size = torch.empty((), dtype=dtype).element_size()
        n = size * torch.Size(shape).numel()
        self._bytes = torch.full((n + 2 * MARGIN,), _CANARY, dtype=torch.uint8)
        self.tensor: Tensor = self._bytes[MARGIN : MARGIN + n].view(dtype).view(shape)
        self.tensor.fill_(float("nan") if dtype.is_floating_point else 113)

    def assert_margins_intact(self) -> None:
        margins = torch.cat((self._bytes[:MARGIN], self._bytes[-MARGIN:]))
        assert (margins == _CANARY).all(), "written outside of the buffer"


def guard(x: Tensor) -> Guarded:
    """A copy of `x` between margins. Reads beyond its ends see canaries: NaN-like garbage, not zeros."""
    guarded = Guarded(tuple(x.shape), x.dtype)
    guarded.tensor.copy_(x)
    return guarded
