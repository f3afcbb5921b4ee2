"""Runs compiled loops of edits (cpu/invariant/edits.py) over the pairs of a rule, on torch tensors."""

from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from patchclamp_server.cpu.invariant import edits

if TYPE_CHECKING:
    from patchclamp_server.interventions.kinds.rules import Entries, Units

ADD, PROJECT, ROTATE = edits.ADD, edits.PROJECT, edits.ROTATE


def edit_rows(
    formula: int,
    x: Tensor,
    entries: "Entries",
    vectors: Tensor,
    bounds: tuple[Tensor, Tensor],
    opened: Tensor,
    *,
    preserve_norm: bool,
) -> tuple[Tensor, Tensor]:
    """Edits x [T, width] in place by vectors [k, width] of the entries. Returns |delta| and |h|, [E] each.

    `bounds` [E] are low and high of PROJECT; of ROTATE the first has radians.
    """
    deltas, norms = torch.empty(2, len(entries)).unbind(0)
    low, high = (bound.numpy() for bound in bounds)
    rows, which, strength = entries.numbers
    arguments = rows, which, vectors.numpy(), low, high, strength, opened.numpy()
    edits.edit_rows(formula, x.numpy(), *arguments, preserve_norm, deltas.numpy(), norms.numpy())
    return deltas, norms


def add_to_rows(x: Tensor, entries: "Entries", vectors: Tensor, opened: Tensor) -> Tensor:
    """Adds vectors [k, width] of the entries to x [T, width] in place, by their strengths. Returns |h| [E]."""
    norms = torch.empty(len(entries))
    rows, which, strength = entries.numbers
    edits.add_to_rows(x.numpy(), rows, which, vectors.numpy(), strength, opened.numpy(), norms.numpy())
    return norms


def edit_units(
    x: Tensor,
    entries: "Entries",
    units: "Units",
    factor: Tensor,
    offset: Tensor,
    bounds: tuple[Tensor, Tensor] | None,
    opened: Tensor,
) -> tuple[Tensor, Tensor]:
    """Edits the units of x [T, width] in place: factor [U], offset [U, numbers of a unit], and bounds [U] each.

    Returns |delta| and |h|, [E] each.
    """
    deltas, norms = torch.empty(2, len(entries)).unbind(0)
    low, high = _UNBOUNDED if bounds is None else (bound.numpy() for bound in bounds)
    rows, _, strength = entries.numbers
    starts, unit = units.numbered
    numbers = offset.shape[1], factor.numpy(), offset.numpy(), low, high
    edits.edit_units(x.numpy(), rows, starts, unit, *numbers, strength, opened.numpy(), deltas.numpy(), norms.numpy())
    return deltas, norms


_UNBOUNDED = np.empty(0, dtype=np.float32), np.empty(0, dtype=np.float32)
