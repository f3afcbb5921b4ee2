"""The torch operators of each kind of edit: one group of calls for all programs of a step that use it at a place.

An operator object belongs to a (site, layer, stage) and holds index tensors over *entries*: one entry is one edit of
one program at one row (for neurons and heads: one edit at one neuron or head of a row). `run` edits the activation x
[T, width] in place at those entries only, so rows of other programs keep their bits, and reports the norms of every
(row, edit) group to the step for the receipts.

Whatever the dtype of x, entries are computed in float32 and rounded once, when they are written: float16 holds no norm
above 65,504, and bfloat16 has 8 bits for a sum over thousands of channels.
"""

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from patchclamp_server.cpu.invariant import operators as invariant
from patchclamp_server.interventions.row_arithmetic import add_product, interpolate, row_dots, row_norms, turns


@dataclass(eq=False)
class StepContext:
    """What the operators of one forward pass share."""

    positions: Tensor  # [T]
    latch: Tensor  # [rows of Tables]
    # 1 where a gate is open, one number for each gate entry; the last is always 1 and stands for "no gate".
    open: Tensor
    # |delta|, |h| and openness of each counted group, in the order of execution.
    delta_norms: list[Tensor]
    norms: list[Tensor]
    opened: list[Tensor]

    def count(self, delta_norm: Tensor, norm: Tensor, opened: Tensor) -> None:
        self.delta_norms.append(delta_norm)
        self.norms.append(norm)
        self.opened.append(opened)


class Operator(Protocol):
    def run(self, x: Tensor, context: StepContext) -> None: ...


@dataclass(frozen=True, eq=False)
class Entries:
    """Entries shared by all layers at which the same edits run. E entries over k edits."""

    rows: Tensor  # [E] row of the batch
    edit: Tensor  # [E] which of the k edits
    strength: Tensor  # [E]
    # Entry of StepContext.open, or None when no edit here has a gate.
    gate: Tensor | None
    ones: Tensor  # [E]
    # Pairs (later, earlier) of entries at one row, where edits that commute run as one; None when no row has two.
    pairs: tuple[Tensor, Tensor] | None

    def opened(self, context: StepContext) -> Tensor:
        return self.ones if self.gate is None else context.open.index_select(0, self.gate)


class AddOperator:
    """h + s v. Several edits may add to one row."""

    def __init__(self, entries: Entries, vectors: Tensor) -> None:
        self.entries = entries
        self.vectors = vectors  # [k, width]
        self.delta_norms = row_norms(vectors)[entries.edit] * entries.strength.abs()
        # One row an edit (decode): the products do not change from step to step.
        self.delta = self._delta() if len(entries.rows) == len(vectors) else None

    def _delta(self) -> Tensor:
        return self.vectors.index_select(0, self.entries.edit) * self.entries.strength[:, None]

    def run(self, x: Tensor, context: StepContext) -> None:
        entries = self.entries
        h = x.index_select(0, entries.rows).float()
        delta = self._delta() if self.delta is None else self.delta
        opened = entries.opened(context)
        if entries.gate is not None:
            delta = delta * opened[:, None]
        if entries.pairs is not None:
            later, earlier = entries.pairs
            h.index_add_(0, later, delta.index_select(0, earlier))
        x.index_add_(0, entries.rows, delta.to(x.dtype))
        context.count(self.delta_norms, row_norms(h), opened)


class TargetOperator:
    """h + s (t(h) - h), with the norm kept if asked; subclasses give the target. At most one entry a row."""

    def __init__(self, entries: Entries, vectors: Tensor, preserve_norm: bool) -> None:
        self.entries = entries
        self.vectors = vectors  # [k, width]
        self.preserve_norm = preserve_norm

    def target(self, h: Tensor, norms: Tensor) -> Tensor:
        raise NotImplementedError

    def run(self, x: Tensor, context: StepContext) -> None:
        entries = self.entries
        h = x.index_select(0, entries.rows).float()
        norms = row_norms(h)
        edited = interpolate(h, self.target(h, norms), entries.strength[:, None])
        if self.preserve_norm:
            reached = row_norms(edited)
            # A strength of 0 must leave the bits alone, and x * (n / n) may not; nothing rescales an empty row.
            fixed = (entries.strength == 0) | (reached == 0)
            scale = torch.where(fixed, torch.ones_like(reached), norms / reached)
            edited = edited * scale[:, None]
        opened = entries.opened(context)
        if entries.gate is not None:
            edited = torch.where(opened[:, None] > 0, edited, h)
        x.index_copy_(0, entries.rows, edited.to(x.dtype))
        context.count(row_norms(edited - h), norms, opened)


class AddPreservingOperator(TargetOperator):
    """t(h) = h + v, followed by the rescaling to |h|."""

    def target(self, h: Tensor, norms: Tensor) -> Tensor:
        return h + self.vectors.index_select(0, self.entries.edit)


class ReplaceOperator(TargetOperator):
    """t(h) = v."""

    def target(self, h: Tensor, norms: Tensor) -> Tensor:
        return self.vectors.index_select(0, self.entries.edit)


class ProjectOperator(TargetOperator):
    """t(h) = h + (clip(h·u, low, high) - h·u) u."""

    def __init__(self, entries: Entries, vectors: Tensor, preserve_norm: bool, low: Tensor, high: Tensor) -> None:
        super().__init__(entries, vectors, preserve_norm)
        self.low, self.high = low[entries.edit], high[entries.edit]  # [E]

    def target(self, h: Tensor, norms: Tensor) -> Tensor:
        unit = self.vectors.index_select(0, self.entries.edit)
        projection = row_dots(h, unit)
        clipped = torch.minimum(torch.maximum(projection, self.low), self.high)
        return add_product(h, (clipped - projection)[:, None], unit)


class RotateOperator(TargetOperator):
    """t(h) = |h| (cos θ ĥ + sin θ w), θ = min(radians, angle(h, v)), w the part of v orthogonal to h, normalised."""

    def __init__(self, entries: Entries, vectors: Tensor, preserve_norm: bool, radians: Tensor) -> None:
        super().__init__(entries, vectors, preserve_norm)
        self.radians = radians[entries.edit]  # [E]

    def target(self, h: Tensor, norms: Tensor) -> Tensor:
        unit = self.vectors.index_select(0, self.entries.edit)
        direction = h / norms[:, None]
        cosine = row_dots(direction, unit)
        across = unit - cosine[:, None] * direction
        sine = row_norms(across)
        cosine, share = turns(sine, cosine, self.radians)
        turned = cosine[:, None] * direction + (share / sine)[:, None] * across
        # A row along v has no plane to turn in.
        return torch.where((sine > 1e-6)[:, None], turned * norms[:, None], h)


class Grid:
    """Entries of k edits laid out [k, most entries of one edit], so that all edits form one batched product."""

    def __init__(self, edit: Tensor, k: int) -> None:
        # edit [E]: which edit an entry belongs to; entries of one edit are consecutive.
        counts = torch.bincount(edit, minlength=k)
        self.shape = (k, int(counts.max()))
        starts = torch.cumsum(counts, 0) - counts
        self.place = edit * self.shape[1] + torch.arange(len(edit), device=edit.device) - starts[edit]

    def spread(self, h: Tensor) -> Tensor:  # [E, width] -> [k, most, width]
        k, most = self.shape
        grid = torch.zeros((k * most, h.shape[1]), dtype=h.dtype, device=h.device)
        return grid.index_copy_(0, self.place, h).view(k, most, -1)

    def collect(self, grid: Tensor) -> Tensor:  # [k, most, n] -> [E, n]
        return grid.reshape(-1, grid.shape[2]).index_select(0, self.place)


class LowRankOperator(TargetOperator):
    """t(h) = h + Rᵀ(W h + b - R h). Ranks are padded with zeros to the largest of the step."""

    def __init__(self, entries: Entries, preserve_norm: bool, rotation: Tensor, weight: Tensor, bias: Tensor) -> None:
        super().__init__(entries, rotation, preserve_norm)
        self.rotation = rotation  # [k, rank, width]
        self.difference = weight - rotation
        self.bias = bias[:, None]  # [k, 1, rank]
        self.grid = Grid(entries.edit, len(rotation))

    def target(self, h: Tensor, norms: Tensor) -> Tensor:
        if invariant.holds_for(h):
            return invariant.low_rank(h, self.entries.edit, self.difference, self.bias[:, 0], self.rotation)
        inner = torch.baddbmm(self.bias, self.grid.spread(h), self.difference.transpose(1, 2))
        return h + self.grid.collect(torch.bmm(inner, self.rotation))


@dataclass(frozen=True, eq=False)
class Units:
    """Neurons or heads of the groups of a step: U units over the (row, edit) groups."""

    place: Tensor  # [U] flat index: row * units in a row + unit
    group: Tensor  # [U]
    strength: Tensor  # [U]
    factor: Tensor  # [U]


class NeuronOperator:
    """t(a) = clip(f a + c, low, high) for single neurons."""

    def __init__(self, groups: Entries, units: Units, offset: Tensor, low: Tensor, high: Tensor) -> None:
        self.groups = groups
        self.units = units
        self.offset, self.low, self.high = offset, low, high  # [U]

    def run(self, x: Tensor, context: StepContext) -> None:
        groups, units = self.groups, self.units
        norms = row_norms(x.index_select(0, groups.rows).float())
        flat = x.view(-1)
        a = flat.index_select(0, units.place).float()
        target = torch.minimum(torch.maximum(add_product(self.offset, a, units.factor), self.low), self.high)
        edited = interpolate(a, target, units.strength)
        opened = groups.opened(context)
        if groups.gate is not None:
            edited = torch.where(opened.index_select(0, units.group) > 0, edited, a)
        flat.index_copy_(0, units.place, edited.to(x.dtype))
        norms = _norms_before(groups, units, norms, edited.square() - a.square())
        squares = torch.zeros_like(norms).index_add_(0, units.group, (edited - a).square())
        context.count(squares.sqrt(), norms, opened)


class HeadOperator:
    """t(z) = f z + m for single heads."""

    def __init__(self, groups: Entries, units: Units, n_heads: int, offset: Tensor) -> None:
        self.groups = groups
        self.units = units
        self.n_heads = n_heads
        self.offset = offset  # [U, head_dim]

    def run(self, x: Tensor, context: StepContext) -> None:
        groups, units = self.groups, self.units
        norms = row_norms(x.index_select(0, groups.rows).float())
        heads = x.view(x.shape[0] * self.n_heads, -1)
        z = heads.index_select(0, units.place).float()
        target = add_product(self.offset, z, units.factor[:, None])
        edited = interpolate(z, target, units.strength[:, None])
        opened = groups.opened(context)
        if groups.gate is not None:
            edited = torch.where(opened.index_select(0, units.group)[:, None] > 0, edited, z)
        heads.index_copy_(0, units.place, edited.to(x.dtype))
        norms = _norms_before(groups, units, norms, (edited.square() - z.square()).sum(1))
        squares = torch.zeros_like(norms).index_add_(0, units.group, (edited - z).square().sum(1))
        context.count(squares.sqrt(), norms, opened)


def _norms_before(groups: Entries, units: Units, norms: Tensor, energy: Tensor) -> Tensor:
    """|h| each group was given: that of the row, changed by the groups before it. `energy` [U] is what |h|² gained."""
    if groups.pairs is None:
        return norms
    later, earlier = groups.pairs
    gained = torch.zeros_like(norms).index_add_(0, units.group, energy)
    return norms.square().index_add_(0, later, gained.index_select(0, earlier)).clamp_min_(0.0).sqrt_()


class ConditionOperator:
    """Evaluates conditions: value = h·u (or the cosine), holds where sign · value > sign · threshold."""

    def __init__(
        self, rows: Tensor, units: Tensor, sign: Tensor, threshold: Tensor, cosine: Tensor, valid: Tensor
    ) -> None:
        self.rows = rows  # [E]
        self.units = units  # [E, width]
        self.sign, self.threshold = sign, sign * threshold
        self.cosine = cosine  # [E] bool
        self.valid = valid  # [E] bool, row is in the condition's scope

    def holds(self, x: Tensor) -> Tensor:
        h = x.index_select(0, self.rows).float()
        value = row_dots(h, self.units)
        value = torch.where(self.cosine, value / row_norms(h), value)
        return (self.sign * value > self.threshold) & self.valid


class GateOperator:
    """Opens the gate entries `places` of the step; latches remember the position at which they fired first."""

    def __init__(self, condition: ConditionOperator, places: Tensor, latched: Tensor, latch: Tensor) -> None:
        self.condition = condition
        self.places = places  # [E]
        self.latched = latched  # [E] bool
        self.latch = latch  # [E] row of Tables.latch

    def run(self, x: Tensor, context: StepContext) -> None:
        holds = self.condition.holds(x)
        positions = context.positions.index_select(0, self.condition.rows)
        never = torch.iinfo(torch.int64).max
        fired = torch.where(holds & self.latched, positions, never)
        context.latch.scatter_reduce_(0, self.latch, fired, "amin")
        since = context.latch.index_select(0, self.latch)
        opened = torch.where(self.latched, positions >= since, holds)
        context.open.index_copy_(0, self.places, opened.to(context.open.dtype))
