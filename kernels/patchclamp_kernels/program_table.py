"""Kernels read intervention programs through these tables: what varies by request varies by data.

A program is written once, when its request is admitted. Its *entries* are the things it does, sorted by place; a place
is a (layer, site) of the forward pass, numbered in the order in which the pass reaches it. A step carries for each row
of the batch the slot of its program and one bit for each *item* of the program (an edit, a condition, a readout) that
says whether the row is in the item's scope. A row of slot -1 has no program and is left alone bit for bit.
"""

from dataclasses import dataclass
from enum import IntEnum, IntFlag

from torch import Tensor


class EntryKind(IntEnum):
    """u is a unit vector; s is the strength. Edits give h' = h + s (t(h) - h)."""

    ADD = 0  # t(h) = h + v
    PROJECT = 1  # t(h) = h + (clip(h·u, low, high) - h·u) u
    REPLACE = 2  # t(h) = v
    ROTATE = 3  # towards u by at most `low` radians, at constant |h|
    LOW_RANK = 4  # t(h) = h + Σ_r R_r (W_r·h + b_r - R_r·h)
    NEURONS = 5  # t(a) = clip(factor a + offset, low, high) at single neurons
    HEADS = 6  # t(z) = factor z + offset at single heads
    AFFINE = 7  # t(h)_i = A_i·h + b_i
    AFFINE_LOW_RANK = 8  # t(h) = Σ_r R_r (W_r·h + b_r)
    # t(h) = m s_p + (1 - m) h, with the row s_p of the position p and a mask m; or h + Σ_r R_r (R_r·(s_p - h))
    PATCH = 9
    FEATURES = 10  # t(h) = h + Σ_i (clip(factor f_i + offset, low, high) - f_i) D_i, the features of feature_clamp.py
    CONDITION = 11  # opened[column] = sign · value > sign · threshold, value = h·u, the cosine, or a feature
    PROJECTION = 12  # readings[column] = h·v, or a feature
    NEURON_VALUES = 13  # readings[column + i] = a[neuron i]


class EntryFlag(IntFlag):
    PRESERVE_NORM = 1
    # CONDITION: the position where it held first is remembered. Edits: the gate is open from that position on.
    LATCHED = 2
    # CONDITION: the value is the cosine of h and u.
    COSINE = 4
    # CONDITION, PROJECTION: the value is a feature: p = E·h + bias where that is above its jump, else 0. Its row of the
    # encoder stands for the vector.
    FEATURE = 8
    # FEATURES: f_i is readings[column + i], where a PROJECTION with this flag has left it at an earlier place.
    INPUT = 16


# Columns of ProgramTable.ints.
KIND, ITEM, FLAGS, FIRST, COUNT, GATE, LATCH, COLUMN = range(8)
# Columns of ProgramTable.floats. CONDITION: LOW is the threshold and STRENGTH the sign. Where the value is a feature,
# HIGH is its bias and SPARE its jump, which is not negative.
STRENGTH, LOW, HIGH, SPARE = range(4)
# Columns of ProgramTable.unit_numbers. HEADS use FACTOR alone, LOW_RANK and AFFINE only OFFSET (b_r). FEATURES
# have bias and jump in the last two.
FACTOR, OFFSET, UNIT_LOW, UNIT_HIGH = range(4)
BIAS, JUMP = UNIT_LOW, UNIT_HIGH
# Columns of ProgramTable.unit_ints. HEADS: the head, and the row of its offset in the bank of width head_dim.
# LOW_RANK and AFFINE_LOW_RANK: the bank rows of R_r and W_r. AFFINE: i, and the bank row of A_i; every i once.
# PATCH: -1 and the bank row of m, or -1 - rank to -2 and the bank rows of R_r; then each p, ascending, and the bank row
# of s_p; a row at no such p is left alone.
# FEATURES: the bank rows of D_i and E_i.
UNIT, OTHER = range(2)
# Where the mask of a PATCH stands among its units.
MASK = -1
NO_GATE = -1


@dataclass(frozen=True, eq=False)
class ProgramTable:
    """Has N entries and M units (neurons, heads, ranks, positions or features of an edit) of all loaded programs.

    In the entry columns FIRST is the bank row of its vector, or the first unit row of LOW_RANK, NEURONS, HEADS, AFFINE,
    AFFINE_LOW_RANK, PATCH, FEATURES and NEURON_VALUES; COUNT is the number of units; GATE is a column of `opened`, or
    NO_GATE; LATCH is a row of `latch`. The neurons or heads of an entry ascend, each at most once.
    """

    entries: Tensor  # int32 [slots, places + 1]: entries of slot s at place p are entries[s, p] to entries[s, p + 1]
    ints: Tensor  # int32 [N, 8]
    floats: Tensor  # float32 [N, 4]
    unit_ints: Tensor  # int32 [M, 2]
    unit_numbers: Tensor  # float32 [M, 4]
    latch: Tensor  # int64 [rows]: position at which a latch fired first, or the largest int64


@dataclass(frozen=True, eq=False)
class ProgramRows:
    """Holds what a step says of its T rows, and where it writes. `opened`, `receipts` and `readings` belong to the
    step.

    receipts[t, item] sums over places 1 and |Δ|₂ / |h|₂ of every edit that ran at a row with counted = 1; h is the row
    that the edit was given, changed by the edits before it.
    """

    slot: Tensor  # int32 [T], -1 for no program
    mask: Tensor  # int64 [T, words]: bit i % 64 of word i // 64 is item i
    position: Tensor  # int64 [T]
    counted: Tensor  # int32 [T], 0 or 1
    opened: Tensor  # int32 [T, columns]
    receipts: Tensor  # float32 [T, items, 2]
    readings: Tensor  # float32 [T, columns]
