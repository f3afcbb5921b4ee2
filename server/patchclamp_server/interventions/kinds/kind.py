"""A kind of entry defines how its numbers are written into the tables, and the rule that torch runs.

Kernels know the rule by the number of the kind: patchclamp_kernels.program_table says what they do for it.
"""

from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
from torch import Tensor

from patchclamp_server.interventions.bound import BoundReadout
from patchclamp_server.interventions.columns import UNIT, EntryFlag, EntryKind
from patchclamp_server.interventions.kinds.rules import Entries, Rule
from patchclamp_server.model.arrays import IntArray

Payload = tuple[Tensor, ...]


@dataclass(frozen=True, eq=False)
class UnitColumns:
    """Holds n units of an entry by column of `unit_ints` and `unit_numbers`; columns that are not given are 0.

    Kernels need neurons and heads to ascend.
    """

    ints: dict[int, np.ndarray]
    numbers: dict[int, np.ndarray] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.ints[UNIT])


@dataclass(frozen=True, eq=False)
class Written:
    """Holds the numbers of an edit or readout at a layer. `vectors` [n, width] go to the bank of their width, and
    `units`, given the rows that they got there, to the tables of units. Without units there is an entry for each
    vector, and without either one entry with this `count`, which the rule finds `held` by."""

    vectors: Tensor | None = None
    units: Callable[[IntArray], UnitColumns] | None = None
    count: int = 0
    held: object | None = None
    # [n, 2]: bias and jump of the features whose rows of the encoder the vectors are.
    latents: np.ndarray | None = None


def _no_columns(readout: BoundReadout, layer: int) -> int:
    return 0


def _in_order(readout: BoundReadout, n: int) -> IntArray:
    return np.arange(n, dtype=np.int64)


def _never(a: Payload, b: Payload) -> bool:
    return False


@dataclass(frozen=True, eq=False)
class EditTable:
    """A kind of entry that edits. `rule` gets the entries and the flags that all of them have.

    `commute` tells whether two edits of the kind at one place, with these numbers and without norm preservation, give
    the same in either order, and may run as one.
    """

    entry: EntryKind
    write: Callable[[Payload], Written]
    rule: Callable[[Entries, EntryFlag], Rule]
    commute: Callable[[Payload, Payload], bool] = _never
    # Whether it works on whole rows, whose norm can be preserved.
    whole_rows: bool = True


@dataclass(frozen=True, eq=False)
class ReadoutTable:
    """A kind of entry that reads. `write` gets the readout and a layer.

    For kinds that write numbers of a row, `columns` tells how many at a layer, and `pick` puts them into the order
    asked for.
    """

    entry: EntryKind
    write: Callable[[BoundReadout, int], Written]
    rule: Callable[[Entries, EntryFlag], Rule]
    columns: Callable[[BoundReadout, int], int] = _no_columns
    pick: Callable[[BoundReadout, int], IntArray] = _in_order


def one_vector(payload: Payload) -> Written:
    """Writes the payload (v [width],)."""
    return Written(payload[0][None])


def apart(a: Payload, b: Payload) -> bool:
    """Returns whether two lists of units, which come first in the numbers, have none in common."""
    return not set(a[0].tolist()) & set(b[0].tolist())
