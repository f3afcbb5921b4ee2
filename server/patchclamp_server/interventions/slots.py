"""The tables with a copy on the device, which kernels read: patchclamp_kernels.program_table."""

import numpy as np
import torch
from torch import Tensor

from patchclamp_kernels import program_table as kernel_format
from patchclamp_kernels.program_table import ProgramTable
from patchclamp_server.interventions import columns
from patchclamp_server.interventions.columns import KERNEL_COLUMNS
from patchclamp_server.interventions.scopes import Int32Array
from patchclamp_server.interventions.tables import Tables
from patchclamp_server.model.sites import FORWARD_ORDER

_NAMES = (
    *("KIND", "ITEM", "FLAGS", "FIRST", "COUNT", "GATE", "LATCH", "COLUMN", "STRENGTH", "LOW", "HIGH"),
    *("SPARE", "FACTOR", "OFFSET", "UNIT_LOW", "UNIT_HIGH", "BIAS", "JUMP", "UNIT", "OTHER", "MASK", "NO_GATE"),
)


def formats() -> tuple[dict[str, int], dict[str, int]]:
    """Returns the names and numbers of kinds, flags and columns on the host and in the kernels."""
    both = []
    for module in (columns, kernel_format):
        numbers = {name: getattr(module, name) for name in _NAMES}
        numbers |= {kind.name: kind.value for kind in module.EntryKind if kind.value < columns.EntryKind.TOP_NEURONS}
        both.append(numbers | {flag.name: flag.value for flag in module.EntryFlag})
    return both[0], both[1]


if formats()[0] != formats()[1]:
    raise ImportError("interventions/columns.py is not the format of patchclamp_kernels.program_table")


class SlotTables(Tables):
    """Copies rows when a program is admitted, when it first runs, and once for every change of strength."""

    def __init__(
        self,
        n_layers: int,
        dtype: torch.dtype,
        device: torch.device,
        *,
        bank_elements: int = 0,
        entries: int = 4096,
        units: int = 4096,
    ) -> None:
        """Starts with `entries` and `units` rows."""
        super().__init__(dtype, device, bank_elements=bank_elements, entries=entries, units=units)
        self.n_places = n_layers * len(FORWARD_ORDER)
        host = self.host
        self.ranges = torch.zeros((len(host.extents), self.n_places + 1), dtype=torch.int32, device=device)
        self.ints = torch.zeros((entries, KERNEL_COLUMNS), dtype=torch.int32, device=device)
        self.floats = torch.zeros(host.floats.shape, dtype=torch.float32, device=device)
        self.unit_ints = torch.zeros(host.unit_ints.shape, dtype=torch.int32, device=device)
        self.unit_numbers = torch.zeros(host.unit_numbers.shape, dtype=torch.float32, device=device)

    @property
    def table(self) -> ProgramTable:
        return ProgramTable(self.ranges, self.ints, self.floats, self.unit_ints, self.unit_numbers, self.latch)

    def _units_written(self, rows: slice) -> None:
        host = self.host
        self.unit_ints = _fitted(self.unit_ints, len(host.unit_ints))
        self.unit_numbers = _fitted(self.unit_numbers, len(host.unit_numbers))
        self.unit_ints[rows] = self._copy(host.unit_ints[rows])
        self.unit_numbers[rows] = self._copy(host.unit_numbers[rows])

    def _slot_written(self, slot: int, first: int, places: Int32Array) -> None:
        host, rows = self.host, slice(first, first + len(places))
        self.ranges = _fitted(self.ranges, len(host.extents))
        upto = np.searchsorted(places, np.arange(self.n_places + 1), side="left")
        self.ranges[slot] = self._copy((first + upto).astype(np.int32))
        self.ints, self.floats = _fitted(self.ints, len(host.ints)), _fitted(self.floats, len(host.floats))
        self.ints[rows] = self._copy(host.ints[rows, :KERNEL_COLUMNS])
        self.floats[rows] = self._copy(host.floats[rows])

    def _copy(self, array: np.ndarray) -> Tensor:
        return torch.from_numpy(np.ascontiguousarray(array)).to(self.device)


def _fitted(data: Tensor, capacity: int) -> Tensor:
    """Returns `data` with at least `capacity` rows; what is written stays."""
    if len(data) >= capacity:
        return data
    return torch.cat((data, data.new_zeros((capacity - len(data), *data.shape[1:]))))
