"""This op makes the neurons of an MLP, and edits and reads single neurons in the same pass.

    a = act(gate) · up        (gated)            a = act(hidden)        (ungated)
    t(a) = clip(factor a + offset, low, high),   a' = a + s (t(a) - a)  at the neurons of each NEURONS entry, in order
    readings[t, column + i] = a'[neuron i]       for each NEURON_VALUES entry, after all edits

hidden [T, 2 d_ff] is gate, then up (the output of the fused projection); neurons [T, d_ff] have its dtype. The
arithmetic is fp32, rounded where a composition of torch operators rounds: act(gate), the product, and the result of
each entry. So rows without a program are torch's up to the accuracy of exp and erf, s = 1 gives t(a) and s = 0 gives a,
bit for bit. GELU-tanh is x sigmoid(2u), which is x (1 + tanh u) / 2 without its cancellation at negative x.

The pass is bound by its bytes: 3 T d_ff elements. Each instance makes one tile of one row. Where the row has a program
it then walks the entries with one lane for each unit, and edits the tile where it was just stored. (One lane for each
neuron, searching the list, would be many times the work: an entry names tens of 14,336 neurons.) The units of an entry
that fall into a tile are found by sampling its ascending list once. `partial` receives the parts of receipts
(receipts.py).
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from patchclamp_kernels.activate import ACTIVATIONS, activate
from patchclamp_kernels.cases import CompileCase, TuningCase
from patchclamp_kernels.configs import Config, config_for
from patchclamp_kernels.gated_activation.program import (
    POINTERS,
    SIZES,
    NeuronProgram,
    check_program,
    program_arguments,
)
from patchclamp_kernels.gated_activation.reference import gated_activation_reference
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
    OFFSET,
    STRENGTH,
    UNIT,
    UNIT_HIGH,
    UNIT_LOW,
    EntryFlag,
    EntryKind,
)
from patchclamp_kernels.runtime import check, check_tensor, uses_kernel

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
DEFAULT = Config({"BLOCK": 1024, "CHUNK": 128}, num_warps=4, num_stages=1)


def neuron_tiles(d_ff: int, device: torch.device, config: Config | None = None) -> int:
    """Returns the number of tiles of a row: the second dimension of `NeuronProgram.partial`."""
    return -(-d_ff // _config(d_ff, device, config).blocks["BLOCK"])


# Compile-time copies: kernels may read no other globals.
_KIND = tl.constexpr(KIND)
_ITEM = tl.constexpr(ITEM)
_FLAGS = tl.constexpr(FLAGS)
_FIRST = tl.constexpr(FIRST)
_COUNT = tl.constexpr(COUNT)
_GATE = tl.constexpr(GATE)
_LATCH = tl.constexpr(LATCH)
_COLUMN = tl.constexpr(COLUMN)
_STRENGTH = tl.constexpr(STRENGTH)
_FACTOR = tl.constexpr(FACTOR)
_OFFSET = tl.constexpr(OFFSET)
_UNIT_LOW = tl.constexpr(UNIT_LOW)
_UNIT_HIGH = tl.constexpr(UNIT_HIGH)
_UNIT = tl.constexpr(UNIT)
_NEURONS = tl.constexpr(int(EntryKind.NEURONS))
_NEURON_VALUES = tl.constexpr(int(EntryKind.NEURON_VALUES))
_LATCHED = tl.constexpr(int(EntryFlag.LATCHED))


@triton.jit
def _entry_runs(e, row, ints, mask, words, position, opened, opened_columns, latch):
    item = tl.load(ints + e * 8 + _ITEM).to(tl.int64)
    word = tl.load(mask + row * words + item // 64)
    in_scope = ((word >> (item % 64)) & 1) != 0
    gate = tl.load(ints + e * 8 + _GATE)
    latched = (tl.load(ints + e * 8 + _FLAGS) & _LATCHED) != 0
    since = tl.load(latch + tl.load(ints + e * 8 + _LATCH), mask=latched, other=0)
    here = tl.load(opened + row * opened_columns + gate, mask=(gate >= 0) & (not latched), other=1) != 0
    return in_scope & tl.where(latched, since <= tl.load(position + row), here)


@triton.jit
def _units_in_tile(units, count, start, BLOCK: tl.constexpr, CHUNK: tl.constexpr):
    """Finds the range of an ascending list that holds its units in [start, start + BLOCK), from CHUNK samples."""
    low = 0
    high = count
    if count > CHUNK:
        stride = tl.cdiv(count, CHUNK)
        sample = tl.arange(0, CHUNK) * stride
        unit = tl.load(units + sample * 2, mask=sample < count, other=0x7FFFFFFF)
        low = tl.maximum(tl.sum((unit < start).to(tl.int32)) - 1, 0) * stride
        high = tl.minimum(tl.sum((unit < start + BLOCK).to(tl.int32)) * stride, count)
    return low, high


# Place and sizes vary from launch to launch: they must not each compile a variant. Loops are `while` because Triton's
# interpreter cannot make a range of loaded bounds with NumPy 2.4.
@triton.jit(
    do_not_specialize=["place", "places", "words", "opened_columns", "reading_columns", "max_entries"],
    do_not_specialize_on_alignment=["partial", "slot", "mask", "position", "opened", "readings"],
)
def _gated_activation_kernel(
    hidden,
    out,
    d_ff,
    tiles,
    entries,
    ints,
    floats,
    unit_ints,
    unit_numbers,
    latch,
    slot,
    mask,
    position,
    opened,
    readings,
    partial,
    place,
    places,
    words,
    opened_columns,
    reading_columns,
    max_entries,
    ACTIVATION: tl.constexpr,
    GATED: tl.constexpr,
    PROGRAM: tl.constexpr,
    BLOCK: tl.constexpr,
    CHUNK: tl.constexpr,
):
    instance = tl.program_id(0)
    row = (instance // tiles).to(tl.int64)
    tile = instance % tiles
    start = tile * BLOCK
    if PROGRAM:
        program = tl.load(slot + row)
    columns = start + tl.arange(0, BLOCK)
    inside = columns < d_ff
    width = 2 * d_ff if GATED else d_ff
    gate = tl.load(hidden + row * width + columns, mask=inside, other=0.0)
    a = activate(gate.to(tl.float32), ACTIVATION).to(gate.dtype)
    if GATED:
        up = tl.load(hidden + row * width + d_ff + columns, mask=inside, other=0.0)
        a = (a.to(tl.float32) * up.to(tl.float32)).to(gate.dtype)
    out_row = out + row * d_ff
    tl.store(out_row + columns, a, mask=inside)

    if PROGRAM:
        first = 0
        end = 0
        if program >= 0:
            first = tl.load(entries + program * places + place)
            end = tl.load(entries + program * places + place + 1)
        if first < end:
            lanes = tl.arange(0, CHUNK)
            h = a.to(tl.float32)
            squares = tl.sum(h * h)
            # From here on threads read what others stored.
            tl.debug_barrier()
            e = first
            while e < end:
                if tl.load(ints + e * 8 + _KIND) == _NEURONS:
                    if e > first:
                        h = tl.load(out_row + columns, mask=inside, other=0.0).to(tl.float32)
                        squares = tl.sum(h * h)
                        tl.debug_barrier()
                    change = -1.0
                    if _entry_runs(e, row, ints, mask, words, position, opened, opened_columns, latch):
                        first_unit = tl.load(ints + e * 8 + _FIRST)
                        units = unit_ints + first_unit * 2 + _UNIT
                        numbers = unit_numbers + first_unit * 4
                        strength = tl.load(floats + e * 4 + _STRENGTH)
                        low, high = _units_in_tile(units, tl.load(ints + e * 8 + _COUNT), start, BLOCK, CHUNK)
                        changes = tl.zeros([CHUNK], tl.float32)
                        i = low
                        while i < high:
                            unit = tl.load(units + (i + lanes) * 2, mask=i + lanes < high, other=-1)
                            mine = (unit >= start) & (unit < start + BLOCK)
                            before = tl.load(out_row + unit, mask=mine, other=0.0)
                            x = before.to(tl.float32)
                            number = numbers + (i + lanes) * 4
                            target = tl.load(number + _FACTOR, mask=mine, other=0.0) * x
                            target += tl.load(number + _OFFSET, mask=mine, other=0.0)
                            floor = tl.load(number + _UNIT_LOW, mask=mine, other=0.0)
                            ceiling = tl.load(number + _UNIT_HIGH, mask=mine, other=0.0)
                            target = tl.maximum(target, floor, propagate_nan=tl.PropagateNan.ALL)
                            target = tl.minimum(target, ceiling, propagate_nan=tl.PropagateNan.ALL)
                            # torch.lerp: exact at both ends.
                            way = target - x
                            near = tl.where(tl.abs(strength) < 0.5, x + strength * way, target - way * (1.0 - strength))
                            edited = tl.where(strength == 0.0, before, near.to(before.dtype))
                            tl.store(out_row + unit, edited, mask=mine)
                            moved = edited.to(tl.float32) - x
                            changes += tl.where(mine, moved * moved, 0.0)
                            i += CHUNK
                        change = tl.sum(changes)
                        tl.debug_barrier()
                    sums = partial + ((row * tiles + tile) * max_entries + e - first) * 2
                    tl.store(sums, squares)
                    tl.store(sums + 1, change)
                e += 1
            e = first
            while e < end:
                wanted = tl.load(ints + e * 8 + _KIND) == _NEURON_VALUES
                if wanted & _entry_runs(e, row, ints, mask, words, position, opened, opened_columns, latch):
                    units = unit_ints + tl.load(ints + e * 8 + _FIRST) * 2 + _UNIT
                    reading = readings + row * reading_columns + tl.load(ints + e * 8 + _COLUMN)
                    low, high = _units_in_tile(units, tl.load(ints + e * 8 + _COUNT), start, BLOCK, CHUNK)
                    i = low
                    while i < high:
                        unit = tl.load(units + (i + lanes) * 2, mask=i + lanes < high, other=-1)
                        mine = (unit >= start) & (unit < start + BLOCK)
                        value = tl.load(out_row + unit, mask=mine, other=0.0).to(tl.float32)
                        tl.store(reading + i + lanes, value, mask=mine)
                        i += CHUNK
                e += 1


def gated_activation(
    hidden: Tensor,
    *,
    activation: str,
    gated: bool,
    program: NeuronProgram | None = None,
    out: Tensor | None = None,
    config: Config | None = None,
) -> Tensor:
    """Returns neurons [T, d_ff] of hidden [T, 2 d_ff] (gate, then up) if `gated`, else [T, d_ff]; see the module.

    With a program, `rows.readings` and `program.partial` are written. Entries of other kinds than NEURONS and
    NEURON_VALUES are ignored, and tables are trusted: see NeuronProgram. Raises ValueError for a wrong argument.
    """
    check(activation in ACTIVATIONS, f"activation is {activation!r}, not one of {', '.join(ACTIVATIONS)}")
    check_tensor("hidden", hidden, shape=(None, None), dtypes=DTYPES, device=hidden.device)
    check(not gated or hidden.shape[1] % 2 == 0, f"hidden has {hidden.shape[1]} columns, not gate and up of one width")
    rows, d_ff = hidden.shape[0], hidden.shape[1] // (2 if gated else 1)
    if out is None:
        out = torch.empty((rows, d_ff), dtype=hidden.dtype, device=hidden.device)
    check_tensor("out", out, shape=(rows, d_ff), dtypes=(hidden.dtype,), device=hidden.device)
    config = _config(d_ff, hidden.device, config)
    tiles = -(-d_ff // config.blocks["BLOCK"])
    if program is not None:
        check_program(program, rows, tiles, hidden.device)
    if not uses_kernel(hidden):
        return out.copy_(gated_activation_reference(hidden, activation=activation, gated=gated, program=program))
    if out.numel() == 0:
        return out
    _gated_activation_kernel[(rows * tiles,)](
        hidden,
        out,
        d_ff,
        tiles,
        *program_arguments(program),
        ACTIVATION=activation,
        GATED=gated,
        PROGRAM=program is not None,
        **config.blocks,
        num_warps=config.num_warps,
        num_stages=config.num_stages,
    )
    return out


def _config(d_ff: int, device: torch.device, config: Config | None) -> Config:
    return config or config_for("gated_activation", f"d_ff={d_ff}", DEFAULT, device)


def compile_cases() -> list[CompileCase]:
    cases = []
    for d_ff in (14336, 6144):
        for program in (False, True):
            signature = {
                "hidden": "*bf16",
                "out": "*bf16",
                "d_ff": "i32",
                "tiles": "i32",
                **dict.fromkeys(SIZES, "i32"),
            }
            constexprs: dict[str, object] = {"ACTIVATION": "silu", "GATED": True, "PROGRAM": program, **DEFAULT.blocks}
            if program:
                signature |= POINTERS
            else:
                constexprs |= dict.fromkeys(POINTERS)
            name = f"gated_activation d_ff={d_ff}" + (" program" if program else "")
            cases.append(CompileCase(name, _gated_activation_kernel, signature, constexprs, DEFAULT, ("d_ff",)))
    return cases


def tuning_cases(device: torch.device) -> list[TuningCase]:
    candidates = tuple(
        Config({"BLOCK": block, "CHUNK": 128}, num_warps=warps, num_stages=1)
        for block in (512, 1024, 2048, 4096)
        for warps in (2, 4, 8)
    )
    cases = []
    for d_ff in (14336, 6144):
        hidden = torch.randn((64, 2 * d_ff), device=device).bfloat16()

        def run(config: Config, hidden: Tensor = hidden) -> object:
            return gated_activation(hidden, activation="silu", gated=True, config=config)

        cases.append(TuningCase("gated_activation", f"d_ff={d_ff}", candidates, run))
    return cases
