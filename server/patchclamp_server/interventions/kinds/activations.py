"""The readout activations reads the rows of a site themselves: all of their numbers, or those of chosen units.

Whole rows leave the step, so torch takes them on every device, where kernels stop for it.
"""

from array import array
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from patchclamp_server.cpu.invariant.reads import Read, gather
from patchclamp_server.errors import InvalidArgument
from patchclamp_server.interventions.bound import BoundReadout
from patchclamp_server.interventions.columns import COUNT, UNIT, EntryFlag, EntryKind
from patchclamp_server.interventions.field_checks import distinct
from patchclamp_server.interventions.kinds.kind import ReadoutTable, UnitColumns, Written
from patchclamp_server.interventions.kinds.rankings import RowsRead
from patchclamp_server.interventions.kinds.rules import CompiledRead, Entries, StepContext, Units
from patchclamp_server.interventions.kinds.spec import ReadoutNumbers, ReadoutSpec, Where
from patchclamp_server.interventions.program import ActivationReadout
from patchclamp_server.interventions.resolver import check_indices
from patchclamp_server.model.sites import Site

if TYPE_CHECKING:
    # The engine also runs where the messages are not installed.
    from patchclamp.v1 import program_pb2 as pb

# Numbers that the readouts of a program may take of one token: they come in one message.
MAX_NUMBERS = 256 * 1024


class ActivationRule(RowsRead, CompiledRead):
    """Copies rows, or chosen units of them, as the step passes; they go to the host together when it is over."""

    def __init__(self, entries: Entries, flags: EntryFlag) -> None:
        self.width = entries.width
        counts = entries.host.ints[entries.entry, COUNT]
        self.is_whole = counts == 0  # [E]
        self.rows = entries.tensor(entries.row[self.is_whole])
        self.units = Units(entries, entries.width)
        numbers = entries.host.unit_ints[self.units.number, UNIT].tolist()
        ends = np.cumsum(counts)
        # The units of each pair, and where their values end among those of all pairs.
        self.ids = [tuple(numbers[end - n : end]) for end, n in zip(ends.tolist(), counts.tolist(), strict=True)]
        self.ends = ends.tolist()
        self.read: tuple[Tensor, Tensor] | None = None

    def run(self, x: Tensor, context: StepContext) -> None:
        whole, units = self._memory(x.dtype, x.device)
        torch.index_select(x, 0, self.rows, out=whole)
        torch.index_select(x.reshape(-1), 0, self.units.place, out=units)

    def _memory(self, dtype: torch.dtype, device: torch.device) -> tuple[Tensor, Tensor]:
        """Every step writes this again: `found` copies from it."""
        if self.read is None:
            whole = torch.empty(len(self.rows), self.width, dtype=dtype, device=device)
            self.read = whole, torch.empty(len(self.units.place), dtype=dtype, device=device)
        return self.read

    def reads(self, readings: Tensor) -> list[Read]:
        whole, units = self._memory(torch.float32, readings.device)
        copies = (self.rows.numpy() * self.width, self.width, whole), (self.units.place.numpy(), 1, units)
        return [
            gather(place, run, out.numpy().reshape(-1), np.arange(len(place), dtype=np.int64) * run)
            for place, run, out in copies
            if len(place)
        ]

    def found(self, end: Tensor) -> list[tuple[Sequence[float], tuple[int, ...]]]:
        assert self.read is not None
        whole, units = (read.float().cpu().numpy() for read in self.read)
        rows = iter(whole)
        # Arrays, since a row of Python's own numbers has eight times the bytes.
        return [
            (array("f", (next(rows) if is_whole else units[end - len(ids) : end]).tobytes()), ids)
            for is_whole, ids, end in zip(self.is_whole.tolist(), self.ids, self.ends, strict=True)
        ]


def _units(readout: BoundReadout, layer: int) -> Written:
    if not readout.ids:
        return Written()
    return Written(None, lambda rows: UnitColumns({UNIT: np.array(readout.ids, dtype=np.int64)}))


ACTIVATIONS = ReadoutTable(EntryKind.ACTIVATIONS, _units, ActivationRule)


def _decode(proto: "pb.ActivationReadout", field: str) -> ActivationReadout:
    return ActivationReadout(distinct(proto.units, f"{field}.units"))


def _bind(kind: ActivationReadout, where: Where) -> ReadoutNumbers:
    check_indices(kind.units, where.width, f"{where.path}.units", "unit")
    return ReadoutNumbers(ids=kind.units)


def check_numbers(readouts: Sequence[BoundReadout], widths: Mapping[Site, int]) -> None:
    """Raises InvalidArgument where those of a program take more numbers of a token than fit a message."""
    total = 0
    for i, readout in enumerate(readouts):
        if readout.kind is ActivationReadout:
            total += len(readout.layers) * (len(readout.ids) or widths[readout.site])
        if total > MAX_NUMBERS:
            message = f"{total} numbers of one token up to here; at most {MAX_NUMBERS}: choose fewer layers or units"
            raise InvalidArgument(f"program.readouts[{i}].activations", message)


READOUTS = (ReadoutSpec("activations", ActivationReadout, _decode, _bind, ("read_activation",), ACTIVATIONS),)
