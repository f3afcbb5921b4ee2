"""The definition of `gated_activation` in torch, one entry of a row at a time; in float64 the truth of the tests."""

import torch
from torch import Tensor

from patchclamp_kernels.activate import activate_reference
from patchclamp_kernels.gated_activation.program import NeuronProgram
from patchclamp_kernels.program_table import (
    COLUMN,
    COUNT,
    FACTOR,
    FIRST,
    FLAGS,
    GATE,
    ITEM,
    KIND,
    LATCH,
    NO_GATE,
    OFFSET,
    STRENGTH,
    UNIT,
    UNIT_HIGH,
    UNIT_LOW,
    EntryFlag,
    EntryKind,
    ProgramRows,
    ProgramTable,
)
from patchclamp_kernels.runtime import accumulation_dtype


def gated_activation_reference(
    hidden: Tensor, *, activation: str, gated: bool, program: NeuronProgram | None = None
) -> Tensor:
    wide = accumulation_dtype(hidden.dtype)
    gate, up = hidden.chunk(2, dim=1) if gated else (hidden, None)
    neurons = activate_reference(gate.to(wide), activation).to(hidden.dtype)
    if up is not None:
        neurons = neurons * up
    if program is not None:
        for t, slot in enumerate(program.rows.slot.tolist()):
            if slot >= 0:
                _run_program(neurons[t], t, slot, program)
    return neurons


def _run_program(a: Tensor, t: int, slot: int, program: NeuronProgram) -> None:
    """Edits one row [d_ff] in place."""
    table, rows = program.table, program.rows
    wide = accumulation_dtype(a.dtype)
    first, end = table.entries[slot, program.place : program.place + 2].tolist()
    for e in range(first, end):
        ints = table.ints[e].tolist()
        if ints[KIND] != EntryKind.NEURONS:
            continue
        # One tile holds the sums of the whole row.
        sums = program.partial[t, :, e - first]
        sums.zero_()
        sums[0, 0], sums[0, 1] = a.to(wide).square().sum(), -1.0
        if not _runs(ints, t, table, rows):
            continue
        units = slice(ints[FIRST], ints[FIRST] + ints[COUNT])
        index = table.unit_ints[units, UNIT].long()
        numbers = table.unit_numbers[units].to(wide)
        before = a[index].to(wide)
        target = torch.addcmul(numbers[:, OFFSET], before, numbers[:, FACTOR])
        target = torch.minimum(torch.maximum(target, numbers[:, UNIT_LOW]), numbers[:, UNIT_HIGH])
        strength = table.floats[e, STRENGTH].to(wide)
        if strength != 0:
            a[index] = torch.lerp(before, target, strength).to(a.dtype)
        sums[0, 1] = (a[index].to(wide) - before).square().sum()
    for e in range(first, end):
        ints = table.ints[e].tolist()
        if ints[KIND] == EntryKind.NEURON_VALUES and _runs(ints, t, table, rows):
            index = table.unit_ints[ints[FIRST] : ints[FIRST] + ints[COUNT], UNIT].long()
            rows.readings[t, ints[COLUMN] : ints[COLUMN] + ints[COUNT]] = a[index].to(rows.readings.dtype)


def _runs(ints: list[int], t: int, table: ProgramTable, rows: ProgramRows) -> bool:
    """Returns whether row t is in the scope of the entry, and its gate is open."""
    if not int(rows.mask[t, ints[ITEM] // 64]) >> (ints[ITEM] % 64) & 1:
        return False
    if ints[FLAGS] & EntryFlag.LATCHED:
        return bool(table.latch[ints[LATCH]] <= rows.position[t])
    return ints[GATE] == NO_GATE or bool(rows.opened[t, ints[GATE]])
