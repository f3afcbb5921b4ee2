"""An activation pass reads programs through these arguments of its kernel."""

from dataclasses import dataclass

import torch
from torch import Tensor

from patchclamp_kernels.program_table import ProgramRows, ProgramTable
from patchclamp_kernels.runtime import check, check_tensor

# Types of the kernel's arguments, as CompileCase names them.
POINTERS = {
    "entries": "*i32",
    "ints": "*i32",
    "floats": "*fp32",
    "unit_ints": "*i32",
    "unit_numbers": "*fp32",
    "latch": "*i64",
    "slot": "*i32",
    "mask": "*i64",
    "position": "*i64",
    "opened": "*i32",
    "readings": "*fp32",
    "partial": "*fp32",
}
# 32-bit integers, after the pointers.
SIZES = ("place", "places", "words", "opened_columns", "reading_columns", "max_entries")


@dataclass(frozen=True, eq=False)
class NeuronProgram:
    """The programs of a step at one place. Their entries there are NEURONS and NEURON_VALUES only: the caller
    guarantees this, and edits places with other kinds through `edit_rows`.

    `partial` is scratch memory: for each tile of `neuron_tiles`, and each entry of the row's program at the place, it
    has |h|² before the entry and |Δ|² of the entry, or -1 where it did not run. It has rows for T or more, and room for
    the most entries that a program has at this place.
    """

    table: ProgramTable
    rows: ProgramRows
    place: int
    partial: Tensor  # float32 [T, tiles, max_entries, 2]


def check_program(program: NeuronProgram, n_rows: int, tiles: int, device: torch.device) -> None:
    table, rows = program.table, program.rows
    int32, int64, float32 = torch.int32, torch.int64, torch.float32
    tensors: list[tuple[str, Tensor, tuple[int | None, ...], torch.dtype]] = [
        ("table.entries", table.entries, (None, None), int32),
        ("table.ints", table.ints, (None, 8), int32),
        ("table.floats", table.floats, (table.ints.shape[0], 4), float32),
        ("table.unit_ints", table.unit_ints, (None, 2), int32),
        ("table.unit_numbers", table.unit_numbers, (table.unit_ints.shape[0], 4), float32),
        ("table.latch", table.latch, (None,), int64),
        ("rows.slot", rows.slot, (n_rows,), int32),
        ("rows.mask", rows.mask, (n_rows, None), int64),
        ("rows.position", rows.position, (n_rows,), int64),
        ("rows.opened", rows.opened, (n_rows, None), int32),
        ("rows.readings", rows.readings, (n_rows, None), float32),
        ("partial", program.partial, (None, tiles, None, 2), float32),
    ]
    for name, x, shape, dtype in tensors:
        check_tensor(f"program.{name}", x, shape=shape, dtypes=(dtype,), device=device)
    places = table.entries.shape[1] - 1
    check(0 <= program.place < places, f"program.place is {program.place}, not one of {places} places")
    check(
        program.partial.shape[0] >= n_rows, f"program.partial has {program.partial.shape[0]} rows, fewer than {n_rows}"
    )


def program_arguments(program: NeuronProgram | None) -> tuple[Tensor | int | None, ...]:
    """Returns the arguments in the order of POINTERS and SIZES."""
    if program is None:
        return (None,) * len(POINTERS) + (0,) * len(SIZES)
    table, rows = program.table, program.rows
    return (
        table.entries,
        table.ints,
        table.floats,
        table.unit_ints,
        table.unit_numbers,
        table.latch,
        rows.slot,
        rows.mask,
        rows.position,
        rows.opened,
        rows.readings,
        program.partial,
        program.place,
        table.entries.shape[1],
        rows.mask.shape[1],
        rows.opened.shape[1],
        rows.readings.shape[1],
        program.partial.shape[2],
    )
