"""This has the arguments of `residual_edits`, and its definition in torch: one row at a time, one entry at a time."""

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from patchclamp_kernels.program_table import (
    BIAS,
    FACTOR,
    JUMP,
    MASK,
    NO_GATE,
    OFFSET,
    OTHER,
    UNIT,
    UNIT_HIGH,
    UNIT_LOW,
    EntryFlag,
    EntryKind,
    ProgramRows,
    ProgramTable,
)
from patchclamp_kernels.runtime import accumulation_dtype, check, check_tensor

Places = tuple[int, int]
TINY = torch.finfo(torch.float32).tiny
# Sine of the angle between a row and a vector below which they have no plane to turn in.
PARALLEL = 1e-6


@dataclass(frozen=True, eq=False)
class NormParams:
    """Holds an RMS norm where `bias` is None, else a LayerNorm."""

    weight: Tensor  # [d]
    bias: Tensor | None  # [d]
    eps: float


@dataclass(frozen=True, eq=False)
class ProgramStep:
    """The programs of a step's rows, for activations of one width. Raises ValueError for tensors that do not fit.

    It is checked when it is made, once for each step, and not at each of the many launches that take it. The contents
    of its tables are not checked: a row of `bank` or of `head_bank` (needed where there are entries of HEADS) that does
    not exist is read.
    """

    table: ProgramTable
    rows: ProgramRows
    bank: Tensor  # [capacity, width] vectors in the dtype of the activation
    head_bank: Tensor | None = None  # [capacity, head_dim]
    head_dim: int = 0

    def __post_init__(self) -> None:
        table, rows, device = self.table, self.rows, self.bank.device
        t = rows.slot.shape[0]
        i32, i64, f32 = (torch.int32,), (torch.int64,), (torch.float32,)
        check_tensor("table.entries", table.entries, shape=(None, None), dtypes=i32, device=device)
        check_tensor("table.ints", table.ints, shape=(None, 8), dtypes=i32, device=device)
        check_tensor("table.floats", table.floats, shape=(len(table.ints), 4), dtypes=f32, device=device)
        check_tensor("table.unit_ints", table.unit_ints, shape=(None, 2), dtypes=i32, device=device)
        check_tensor(
            "table.unit_numbers", table.unit_numbers, shape=(len(table.unit_ints), 4), dtypes=f32, device=device
        )
        check_tensor("table.latch", table.latch, shape=(None,), dtypes=i64, device=device)
        check_tensor("rows.slot", rows.slot, shape=(t,), dtypes=i32, device=device)
        check_tensor("rows.mask", rows.mask, shape=(t, None), dtypes=i64, device=device)
        check_tensor("rows.position", rows.position, shape=(t,), dtypes=i64, device=device)
        check_tensor("rows.counted", rows.counted, shape=(t,), dtypes=i32, device=device)
        check_tensor("rows.opened", rows.opened, shape=(t, None), dtypes=i32, device=device)
        check_tensor("rows.receipts", rows.receipts, shape=(t, None, 2), dtypes=f32, device=device)
        check_tensor("rows.readings", rows.readings, shape=(t, None), dtypes=f32, device=device)
        words, items = rows.mask.shape[1], rows.receipts.shape[1]
        check(items <= 64 * words, f"rows.mask has {words} words, which {items} items do not fit")
        check_tensor("bank", self.bank, shape=(None, None), dtypes=(self.bank.dtype,), device=device)
        if self.head_bank is not None:
            shape, dtypes = (None, self.head_dim), (self.bank.dtype,)
            check_tensor("head_bank", self.head_bank, shape=shape, dtypes=dtypes, device=device)
            check(self.head_dim > 0, f"head_dim is {self.head_dim}, not positive")


def residual_edits_reference(
    x: Tensor,
    *,
    delta: Tensor | None = None,
    delta_norm: NormParams | None = None,
    program: ProgramStep | None = None,
    delta_places: Places | None = None,
    places: Places | None = None,
    norm: NormParams | None = None,
    out: Tensor | None = None,
) -> Tensor | None:
    """Edits x in place, writes what the program observes, and returns norm(x) or None."""
    if delta is not None:
        e = delta if delta_norm is None else normalised(delta, delta_norm)
        if program is not None and delta_places is not None:
            e = _edited(e, program, delta_places)
        wide = accumulation_dtype(x.dtype)
        x.copy_(x.to(wide) + e.to(wide))
    if program is not None and places is not None:
        x.copy_(_edited(x, program, places))
    if norm is None:
        return None
    if out is None:
        return normalised(x, norm)
    return out.copy_(normalised(x, norm))


def normalised(x: Tensor, norm: NormParams) -> Tensor:
    """Returns x / sqrt(mean(x²) + eps) · weight, or with a bias (x - mean) / sqrt(var + eps) · weight + bias.

    The result is rounded once.
    """
    h = x.to(accumulation_dtype(x.dtype))
    if norm.bias is not None:
        h = h - h.mean(dim=1, keepdim=True)
    h = h * torch.rsqrt(h.square().mean(dim=1, keepdim=True) + norm.eps) * norm.weight.to(h.dtype)
    if norm.bias is not None:
        h = h + norm.bias.to(h.dtype)
    return h.to(x.dtype)


def _edited(x: Tensor, step: ProgramStep, places: Places) -> Tensor:
    edited = x.clone()
    for t, slot in enumerate(step.rows.slot.tolist()):
        if slot >= 0:
            start, end = (int(step.table.entries[slot, place]) for place in places)
            h = x[t].to(accumulation_dtype(x.dtype))
            edited[t] = _Row(step, t).run(h, range(start, end)).to(x.dtype)
    return edited


class _Entry(NamedTuple):
    """A row of ProgramTable.ints, then one of ProgramTable.floats."""

    kind: int
    item: int
    flags: int
    first: int
    n_units: int
    gate: int
    latch: int
    column: int
    strength: float
    low: float
    high: float
    spare: float

    def has(self, flag: EntryFlag) -> bool:
        return bool(self.flags & flag)


class _Row:
    """Row t of the batch while the entries of its program run."""

    def __init__(self, step: ProgramStep, t: int) -> None:
        self.step = step
        self.table = step.table
        self.rows = step.rows
        self.t = t
        self.position = int(step.rows.position[t])
        self.counted = bool(step.rows.counted[t])

    def run(self, h: Tensor, entries: range) -> Tensor:  # h [width]
        for i in entries:
            entry = _Entry(*self.table.ints[i].tolist(), *self.table.floats[i].tolist())
            if entry.kind >= EntryKind.CONDITION:
                self.observe(entry, h)
                continue
            if self.in_scope(entry) and self.is_open(entry):
                edited = h if entry.strength == 0 else self.edited(entry, h)
                if self.counted:
                    norm = torch.linalg.vector_norm(h)
                    change = torch.linalg.vector_norm(edited - h) / norm.clamp_min(TINY)
                    self.rows.receipts[self.t, entry.item] += torch.stack((torch.ones_like(change), change))
                h = edited
        return h

    def in_scope(self, entry: _Entry) -> bool:
        return bool(int(self.rows.mask[self.t, entry.item // 64]) >> (entry.item % 64) & 1)

    def is_open(self, entry: _Entry) -> bool:
        if entry.gate == NO_GATE:
            return True
        if entry.has(EntryFlag.LATCHED):
            return int(self.table.latch[entry.latch]) <= self.position
        return bool(self.rows.opened[self.t, entry.gate])

    def observe(self, entry: _Entry, h: Tensor) -> None:
        in_scope, readings = self.in_scope(entry), self.rows.readings[self.t]
        if entry.kind == EntryKind.CONDITION:
            holds = in_scope and self.holds(entry, h)
            self.rows.opened[self.t, entry.column] = holds
            if holds and entry.has(EntryFlag.LATCHED):
                self.table.latch[entry.latch].clamp_(max=self.position)
        elif in_scope and entry.kind == EntryKind.PROJECTION:
            readings[entry.column] = self.value(entry, h)
        elif in_scope:
            neurons = self.units(entry)[0][:, UNIT]
            readings[entry.column : entry.column + entry.n_units] = h[neurons]

    def value(self, entry: _Entry, h: Tensor) -> Tensor:
        value = h @ self.vector(entry.first)
        if entry.has(EntryFlag.FEATURE):
            value = value + entry.high
            value = torch.where(value <= entry.spare, torch.zeros_like(value), value)
        return value

    def holds(self, entry: _Entry, h: Tensor) -> bool:
        value = self.value(entry, h)
        if entry.has(EntryFlag.COSINE):
            value = value / torch.linalg.vector_norm(h)
        sign = entry.strength
        return bool(sign * value > sign * entry.low)

    def edited(self, entry: _Entry, h: Tensor) -> Tensor:
        if entry.kind == EntryKind.ADD:
            edited = h + entry.strength * self.vector(entry.first)
        else:
            target = self.target(entry, h)
            # What an edit leaves where it is keeps its bits.
            edited = torch.where(target == h, h, torch.lerp(h, target, entry.strength))
        if entry.has(EntryFlag.PRESERVE_NORM):
            reached = torch.linalg.vector_norm(edited)
            if reached != 0:
                edited = edited * (torch.linalg.vector_norm(h) / reached)
        return edited

    def target(self, entry: _Entry, h: Tensor) -> Tensor:
        match EntryKind(entry.kind):
            case EntryKind.REPLACE:
                return self.vector(entry.first)
            case EntryKind.PROJECT:
                u = self.vector(entry.first)
                projection = h @ u
                return h + (projection.clamp(entry.low, entry.high) - projection) * u
            case EntryKind.ROTATE:
                return self.rotated(entry, h)
            case EntryKind.LOW_RANK:
                ints, numbers = self.units(entry)
                r, w = self.vector(ints[:, UNIT]), self.vector(ints[:, OTHER])
                return h + r.T @ (w @ h + numbers[:, OFFSET] - r @ h)
            case EntryKind.AFFINE:
                ints, numbers = self.units(entry)
                target = h.clone()
                target[ints[:, UNIT]] = self.vector(ints[:, OTHER]) @ h + numbers[:, OFFSET]
                return target
            case EntryKind.AFFINE_LOW_RANK:
                ints, numbers = self.units(entry)
                return self.vector(ints[:, UNIT]).T @ (self.vector(ints[:, OTHER]) @ h + numbers[:, OFFSET])
            case EntryKind.PATCH:
                ints, _ = self.units(entry)
                own = ints[ints[:, UNIT] == self.position, OTHER]
                if not len(own):
                    return h
                source = self.vector(own[0])
                if ints[0, UNIT] == MASK:
                    return torch.where(self.vector(ints[0, OTHER]) != 0, source, h)
                r = self.vector(ints[ints[:, UNIT] < MASK, OTHER])
                return h + r.T @ (r @ (source - h))
            case EntryKind.FEATURES:
                ints, numbers = self.units(entry)
                f = self.features(entry, h)
                if entry.has(EntryFlag.INPUT):
                    f = self.rows.readings[self.t, entry.column : entry.column + entry.n_units].to(h.dtype)
                goal = (numbers[:, FACTOR] * f + numbers[:, OFFSET]).clamp(entry.low, entry.high)
                return h + (goal - f) @ self.vector(ints[:, UNIT])
            case EntryKind.NEURONS:
                ints, numbers = self.units(entry)
                target, neurons = h.clone(), ints[:, UNIT]
                edited = numbers[:, FACTOR] * h[neurons] + numbers[:, OFFSET]
                target[neurons] = torch.minimum(torch.maximum(edited, numbers[:, UNIT_LOW]), numbers[:, UNIT_HIGH])
                return target
            case _:
                ints, numbers = self.units(entry)
                assert self.step.head_bank is not None
                target, heads = h.clone().view(-1, self.step.head_dim), ints[:, UNIT]
                offset = self.step.head_bank[ints[:, OTHER]].to(h.dtype)
                target[heads] = numbers[:, FACTOR, None] * target[heads] + offset
                return target.view(-1)

    def rotated(self, entry: _Entry, h: Tensor) -> Tensor:
        """Returns |h| (cos θ ĥ + sin θ w), θ = min(radians, angle(h, u)), w the unit part of u orthogonal to h."""
        norm = torch.linalg.vector_norm(h)
        if norm == 0:
            return h
        u, direction = self.vector(entry.first), h / norm
        cosine = direction @ u
        across = u - cosine * direction
        sine = torch.linalg.vector_norm(across)
        if not sine > PARALLEL:
            return h
        angle = torch.atan2(sine, cosine).clamp(max=entry.low)
        turned: Tensor = norm * (torch.cos(angle) * direction + torch.sin(angle) / sine * across)
        return turned

    def features(self, entry: _Entry, h: Tensor) -> Tensor:
        """Returns p where p > jump, else 0, with p = E h + bias."""
        ints, numbers = self.units(entry)
        p = self.vector(ints[:, OTHER]) @ h + numbers[:, BIAS]
        return torch.where(p <= numbers[:, JUMP], torch.zeros_like(p), p)

    def vector(self, row: int | Tensor) -> Tensor:
        vector: Tensor = self.step.bank[row]
        return vector.to(accumulation_dtype(vector.dtype))

    def units(self, entry: _Entry) -> tuple[Tensor, Tensor]:
        rows = slice(entry.first, entry.first + entry.n_units)
        numbers = self.table.unit_numbers[rows].to(accumulation_dtype(self.step.bank.dtype))
        return self.table.unit_ints[rows].long(), numbers
