"""The scratch memory that an op allocates for itself, watched as closely as its outputs."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from guards import Guarded
from torch import Tensor


@contextmanager
def guarded_scratch() -> Iterator[list[Guarded]]:
    """What an op allocates meanwhile starts as garbage and lies between margins, which must be intact at the end."""
    made: list[Guarded] = []
    plain_empty = torch.empty

    def empty(*shape: Any, **options: Any) -> Tensor:
        # Ops name the device of their arguments; all else is the interpreter's or the guards' own.
        if "device" not in options:
            return plain_empty(*shape, **options)
        assert options.keys() == {"dtype", "device"}
        size = shape[0] if len(shape) == 1 else shape
        made.append(Guarded((size,) if isinstance(size, int) else tuple(size), options["dtype"]))
        return made[-1].tensor

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "empty", empty)
        yield made
    for buffer in made:
        buffer.assert_margins_intact()
