"""On the device each kind of entry of a program edits one row h [BLOCK] in registers, in fp32, as defined here.

Lanes beyond the width hold zeros and keep them. Every scalar here is the same in all threads of the instance, so its
branches never diverge; what one thread wrote for the others to read (`opened`, `latch`) lies behind a barrier.
"""

from typing import NamedTuple

import triton
import triton.language as tl

from patchclamp_kernels import program_table as table
from patchclamp_kernels.feature_clamp import activation, change_to_goal
from patchclamp_kernels.program_table import EntryFlag, EntryKind
from patchclamp_kernels.residual_edits import reference as definition

ADD = tl.constexpr(EntryKind.ADD.value)
PROJECT = tl.constexpr(EntryKind.PROJECT.value)
REPLACE = tl.constexpr(EntryKind.REPLACE.value)
ROTATE = tl.constexpr(EntryKind.ROTATE.value)
LOW_RANK = tl.constexpr(EntryKind.LOW_RANK.value)
NEURONS = tl.constexpr(EntryKind.NEURONS.value)
HEADS = tl.constexpr(EntryKind.HEADS.value)
AFFINE = tl.constexpr(EntryKind.AFFINE.value)
AFFINE_LOW_RANK = tl.constexpr(EntryKind.AFFINE_LOW_RANK.value)
PATCH = tl.constexpr(EntryKind.PATCH.value)
FEATURES = tl.constexpr(EntryKind.FEATURES.value)
CONDITION = tl.constexpr(EntryKind.CONDITION.value)
PROJECTION = tl.constexpr(EntryKind.PROJECTION.value)
NEURON_VALUES = tl.constexpr(EntryKind.NEURON_VALUES.value)

PRESERVE_NORM = tl.constexpr(EntryFlag.PRESERVE_NORM.value)
LATCHED = tl.constexpr(EntryFlag.LATCHED.value)
COSINE = tl.constexpr(EntryFlag.COSINE.value)
FEATURE = tl.constexpr(EntryFlag.FEATURE.value)
INPUT = tl.constexpr(EntryFlag.INPUT.value)

KIND = tl.constexpr(table.KIND)
ITEM = tl.constexpr(table.ITEM)
FLAGS = tl.constexpr(table.FLAGS)
FIRST = tl.constexpr(table.FIRST)
COUNT = tl.constexpr(table.COUNT)
GATE = tl.constexpr(table.GATE)
LATCH = tl.constexpr(table.LATCH)
COLUMN = tl.constexpr(table.COLUMN)
STRENGTH = tl.constexpr(table.STRENGTH)
LOW = tl.constexpr(table.LOW)
HIGH = tl.constexpr(table.HIGH)
UNIT = tl.constexpr(table.UNIT)
OTHER = tl.constexpr(table.OTHER)
FACTOR = tl.constexpr(table.FACTOR)
OFFSET = tl.constexpr(table.OFFSET)
UNIT_LOW = tl.constexpr(table.UNIT_LOW)
UNIT_HIGH = tl.constexpr(table.UNIT_HIGH)
SPARE = tl.constexpr(table.SPARE)
BIAS = tl.constexpr(table.BIAS)
JUMP = tl.constexpr(table.JUMP)
MASK = tl.constexpr(table.MASK)

TINY = tl.constexpr(definition.TINY)
PARALLEL = tl.constexpr(definition.PARALLEL)


class Row(NamedTuple):
    """Has pointers into the tables of all programs, and to what belongs to this row of the batch."""

    ints: tl.tensor
    floats: tl.tensor
    unit_ints: tl.tensor
    unit_numbers: tl.tensor
    latch: tl.tensor
    bank: tl.tensor
    head_bank: tl.tensor
    mask: tl.tensor
    opened: tl.tensor
    receipts: tl.tensor
    readings: tl.tensor
    position: tl.tensor
    counted: tl.tensor
    # A row of x whose values are in registers: room for those that neurons are picked from.
    home: tl.tensor


@triton.jit
def run_entries(h, lane, row, start, end, D: tl.constexpr, HEAD_DIM: tl.constexpr):
    """Returns h after the entries [start, end) of the row's program."""
    i = start
    while i < end:
        ints = row.ints + i * 8
        floats = row.floats + i * 4
        kind = tl.load(ints + KIND)
        item = tl.load(ints + ITEM)
        flags = tl.load(ints + FLAGS)
        first = tl.load(ints + FIRST)
        count = tl.load(ints + COUNT)
        strength = tl.load(floats + STRENGTH)
        in_scope = ((tl.load(row.mask + item // 64) >> (item % 64)) & 1) != 0
        if kind >= CONDITION:
            _observe(h, lane, row, ints, floats, kind, flags, first, count, in_scope, D)
        else:
            runs = in_scope
            if in_scope:
                runs = _is_open(row, ints, flags)
            if runs:
                change = 0.0
                if strength != 0.0:
                    norm = _length(h)
                    if kind == NEURONS:
                        h, moved = _neurons(h, lane, row, first, count, strength, D)
                    else:
                        before = h
                        column = tl.load(ints + COLUMN)
                        h = _edited(
                            h, norm, lane, row, floats, kind, flags, first, count, column, strength, D, HEAD_DIM
                        )
                        moved = _length(h - before)
                    change = moved / tl.maximum(norm, TINY)
                if row.counted != 0:
                    receipt = row.receipts + item * 2
                    tl.store(receipt, tl.load(receipt) + 1.0)
                    tl.store(receipt + 1, tl.load(receipt + 1) + change)
        i += 1
    return h


@triton.jit
def _length(h):
    return tl.sqrt_rn(tl.sum(h * h, axis=0))


@triton.jit
def _vector(bank, index, lane, D: tl.constexpr):
    return tl.load(bank + index.to(tl.int64) * D + lane, mask=lane < D, other=0.0).to(tl.float32)


@triton.jit
def _is_open(row, ints, flags):
    gate = tl.load(ints + GATE)
    is_open = gate < 0
    if gate >= 0:
        # Past the caches of this thread: another one may have written it in this launch.
        if (flags & LATCHED) != 0:
            since = tl.load(row.latch + tl.load(ints + LATCH), volatile=True)
            is_open = since <= row.position
        else:
            is_open = tl.load(row.opened + gate, volatile=True) != 0
    return is_open


@triton.jit
def _observe(h, lane, row, ints, floats, kind, flags, first, count, in_scope, D: tl.constexpr):
    column = tl.load(ints + COLUMN)
    if kind == CONDITION:
        holds = in_scope
        if in_scope:
            holds = _holds(h, lane, row, floats, flags, first, D)
        tl.store(row.opened + column, holds.to(tl.int32))
        if holds & ((flags & LATCHED) != 0):
            tl.atomic_min(row.latch + tl.load(ints + LATCH), row.position)
        tl.debug_barrier()
    elif in_scope:
        if kind == PROJECTION:
            tl.store(row.readings + column, _value(h, lane, row, floats, flags, first, D))
            if (flags & INPUT) != 0:
                # Edits of this row may take it in this launch.
                tl.debug_barrier()
        else:
            _read_neurons(h, lane, row, first, count, column, D)


@triton.jit
def _value(h, lane, row, floats, flags, first, D: tl.constexpr):
    value = tl.sum(h * _vector(row.bank, first, lane, D), axis=0)
    if (flags & FEATURE) != 0:
        value = activation(value + tl.load(floats + HIGH), tl.load(floats + SPARE))
    return value


@triton.jit
def _holds(h, lane, row, floats, flags, first, D: tl.constexpr):
    value = _value(h, lane, row, floats, flags, first, D)
    if (flags & COSINE) != 0:
        value = value / _length(h)
    sign = tl.load(floats + STRENGTH)
    return sign * value > sign * tl.load(floats + LOW)


@triton.jit
def _edited(
    h, norm, lane, row, floats, kind, flags, first, count, column, strength, D: tl.constexpr, HEAD_DIM: tl.constexpr
):
    edited = h
    if kind == ADD:
        edited = h + strength * _vector(row.bank, first, lane, D)
    else:
        target = h
        at = first
        rank = 0
        if kind == PATCH:
            at = _source(row, first, count)
            rank = MASK - tl.load(row.unit_ints + first * 2 + UNIT)
            count = tl.where(at >= 0, rank, 0)
        if (kind == REPLACE) | ((kind == PATCH) & (rank == 0)):
            target = _vector(row.bank, tl.maximum(at, 0), lane, D)
            if kind == PATCH:
                mask = _vector(row.bank, tl.load(row.unit_ints + first * 2 + OTHER), lane, D)
                target = tl.where((mask != 0.0) & (at >= 0), target, h)
        elif kind == PROJECT:
            target = _projected(h, _vector(row.bank, first, lane, D), floats)
        elif kind == ROTATE:
            target = _rotated(h, norm, _vector(row.bank, first, lane, D), tl.load(floats + LOW))
        elif (kind == LOW_RANK) | (kind == AFFINE_LOW_RANK) | (kind == AFFINE) | (kind == FEATURES) | (kind == PATCH):
            target = _by_units(h, lane, row, floats, kind, flags, first, count, column, at, D)
        else:
            if HEAD_DIM > 0:
                target = _heads(h, lane, row, first, count, D, HEAD_DIM)
        # What an edit leaves where it is keeps its bits.
        edited = tl.where(target == h, h, _lerp(h, target, strength))
    if (flags & PRESERVE_NORM) != 0:
        reached = _length(edited)
        if reached != 0.0:
            edited = edited * (norm / reached)
    return edited


@triton.jit
def _lerp(h, target, strength):
    """Returns h + s (t - h), exactly t at s = 1, as torch.lerp does."""
    difference = target - h
    return tl.where(tl.abs(strength) < 0.5, h + strength * difference, target - difference * (1.0 - strength))


@triton.jit
def _projected(h, u, floats):
    projection = tl.sum(h * u, axis=0)
    clipped = tl.minimum(tl.maximum(projection, tl.load(floats + LOW)), tl.load(floats + HIGH))
    return h + (clipped - projection) * u


@triton.jit
def _rotated(h, norm, u, radians):
    """Returns |h| (cos θ ĥ + sin θ w), θ = min(radians, angle(h, u)), w the normalised part of u orthogonal to h."""
    length = tl.maximum(norm, TINY)
    cosine = tl.sum(h * u, axis=0) / length
    # u = cosine ĥ + sine w
    sine = _length(u - (cosine / length) * h)
    turn_cosine = tl.cos(radians)
    turn_sine = tl.sin(radians)
    # Where the angle to u is less than `radians` (the sine of their difference), turn onto u.
    if sine * turn_cosine <= cosine * turn_sine:
        hypotenuse = tl.sqrt_rn(cosine * cosine + sine * sine)
        turn_cosine = cosine / hypotenuse
        turn_sine = sine / hypotenuse
    # A row along u has no plane to turn in, and an empty row no direction.
    turns = (sine > PARALLEL) & (norm > 0.0)
    along_u = tl.where(turns, norm * turn_sine / sine, 0.0)
    along_h = tl.where(turns, turn_cosine - cosine * turn_sine / sine, 1.0)
    return along_h * h + along_u * u


@triton.jit
def _by_units(h, lane, row, floats, kind, flags, first, count, column, source, D: tl.constexpr):
    """Returns targets that are sums over units: ranks R_r with W_r and b_r, channels r with rows A_r of a matrix,
    features f_r with rows E_r of the encoder and D_r of the decoder, or ranks R_r of a patch from bank row `source`, s.

        low rank          h + Σ_r R_r (W_r·h + b_r - R_r·h)
        affine, low rank      Σ_r R_r (W_r·h + b_r)
        affine                Σ_r e_r (A_r·h + b_r)         the whole matrix is read for every row
        features          h + Σ_r D_r (g_r - f_r)           all f_r are those of h as it came
        patch             h + Σ_r R_r (R_r·s - R_r·h)

    One loop serves all of them, because each loop of its own would cost the others registers.
    """
    target = tl.where((kind == LOW_RANK) | (kind == FEATURES) | (kind == PATCH), h, 0.0)
    unit = first
    while unit < first + count:
        w = _vector(row.bank, tl.load(row.unit_ints + unit * 2 + OTHER), lane, D)
        numbers = row.unit_numbers + unit * 4
        offset = tl.load(numbers + OFFSET)
        inner = tl.sum(h * w, axis=0)
        if kind == FEATURES:
            f = activation(inner + tl.load(numbers + BIAS), tl.load(numbers + JUMP))
            if (flags & INPUT) != 0:
                # Past the caches of this thread: another one may have written it in this launch.
                f = tl.load(row.readings + column + unit - first, volatile=True)
            inner = change_to_goal(f, tl.load(numbers + FACTOR), offset, tl.load(floats + LOW), tl.load(floats + HIGH))
        elif kind == PATCH:
            # It is loaded again, because w would take registers for as long as the sum above.
            r = _vector(row.bank, tl.load(row.unit_ints + unit * 2 + OTHER), lane, D)
            inner = tl.sum(_vector(row.bank, source, lane, D) * r, axis=0) - inner
        else:
            inner += offset
        # The rows of a patch are R_r and W_r in one; what stands beside them is no bank row.
        at = tl.load(row.unit_ints + unit * 2 + tl.where(kind == PATCH, OTHER, UNIT))
        # Row 0 of a bank is there whatever it holds.
        r = _vector(row.bank, tl.where(kind == AFFINE, 0, at), lane, D)
        r = tl.where(kind == AFFINE, (lane == at).to(tl.float32), r)
        target += tl.where(kind == LOW_RANK, inner - tl.sum(h * r, axis=0), inner) * r
        unit += 1
    return target


@triton.jit
def _source(row, first, count):
    """Returns the bank row that a patch has for the position of this row, or -1. Its positions ascend after the mask
    or the ranks, which stand below 0."""
    low = first + 1
    high = first + count
    while low < high:
        middle = (low + high) // 2
        below = tl.load(row.unit_ints + middle * 2 + UNIT) < row.position
        low = tl.where(below, middle + 1, low)
        high = tl.where(below, high, middle)
    own = tl.where(low < first + count, low, first)
    found = tl.load(row.unit_ints + own * 2 + UNIT) == row.position
    return tl.where(found, tl.load(row.unit_ints + own * 2 + OTHER), -1)


@triton.jit
def _settle(h, lane, row, D: tl.constexpr):
    """Writes h to a row of memory, where threads find the values that others hold."""
    tl.debug_barrier()
    tl.store(row.home + lane, h.to(row.home.dtype.element_ty), mask=lane < D)
    tl.debug_barrier()


@triton.jit
def _neurons(h, lane, row, first, count, strength, D: tl.constexpr):
    """Returns h with the edited neurons, and the square of what they changed. It goes by way of memory, once for each
    neuron: a search of every lane in the list of neurons costs twice the registers of everything else."""
    _settle(h, lane, row, D)
    # As many at a time: lists are short against a row.
    UNITS: tl.constexpr = h.shape[0] // 32
    unit = tl.arange(0, UNITS)
    square = tl.zeros([UNITS], dtype=tl.float32)
    done = 0
    while done < count:
        listed = done + unit < count
        at = first + done + unit
        neuron = tl.load(row.unit_ints + at * 2 + UNIT, mask=listed, other=0)
        numbers = row.unit_numbers + at * 4
        a = tl.load(row.home + neuron, mask=listed, other=0.0).to(tl.float32)
        target = tl.load(numbers + FACTOR, mask=listed, other=0.0) * a
        target += tl.load(numbers + OFFSET, mask=listed, other=0.0)
        low = tl.load(numbers + UNIT_LOW, mask=listed, other=0.0)
        high = tl.load(numbers + UNIT_HIGH, mask=listed, other=0.0)
        target = tl.maximum(target, low, propagate_nan=tl.PropagateNan.ALL)
        target = tl.minimum(target, high, propagate_nan=tl.PropagateNan.ALL)
        edited = _lerp(a, target, strength)
        tl.store(row.home + neuron, edited.to(row.home.dtype.element_ty), mask=listed)
        square += tl.where(listed, (edited - a) * (edited - a), 0.0)
        done += UNITS
    tl.debug_barrier()
    h = tl.load(row.home + lane, mask=lane < D, other=0.0).to(tl.float32)
    return h, tl.sqrt_rn(tl.sum(square, axis=0))


@triton.jit
def _read_neurons(h, lane, row, first, count, column, D: tl.constexpr):
    _settle(h, lane, row, D)
    UNITS: tl.constexpr = h.shape[0] // 32
    unit = tl.arange(0, UNITS)
    done = 0
    while done < count:
        listed = done + unit < count
        neuron = tl.load(row.unit_ints + (first + done + unit) * 2 + UNIT, mask=listed, other=0)
        a = tl.load(row.home + neuron, mask=listed, other=0.0).to(tl.float32)
        tl.store(row.readings + column + done + unit, a, mask=listed)
        done += UNITS


@triton.jit
def _heads(z, lane, row, first, count, D: tl.constexpr, HEAD_DIM: tl.constexpr):
    target = z
    unit = first
    while unit < first + count:
        inside = lane // HEAD_DIM == tl.load(row.unit_ints + unit * 2 + UNIT)
        offsets = row.head_bank + tl.load(row.unit_ints + unit * 2 + OTHER).to(tl.int64) * HEAD_DIM
        offset = tl.load(offsets + lane % HEAD_DIM, mask=inside & (lane < D), other=0.0).to(tl.float32)
        factor = tl.load(row.unit_numbers + unit * 4 + FACTOR)
        target = tl.where(inside, factor * z + offset, target)
        unit += 1
    return target
