"""The torch rules of all kinds share this: the entries that they run over, and the step in which they do.

A rule is made for one kind of entry at one place, for all programs that use it there: E pairs of an entry and a row of
the batch, sorted by entry, then by row. It gathers its columns of the tables once, and `run` edits the activation
x [T, width] in place at those rows only, so that rows of other programs keep their bits.

Whatever the dtype of x, entries are computed in float32 and rounded once, when they are written: float16 holds no norm
above 65,504, and bfloat16 has 8 bits for a sum over thousands of channels.
"""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from functools import cached_property
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from patchclamp_server.cpu.invariant.operators import holds_for, pair_dots
from patchclamp_server.cpu.invariant.reads import Read
from patchclamp_server.interventions import compiled_writes
from patchclamp_server.interventions.columns import COUNT, FIRST, FLAGS, HIGH, SPARE, UNIT, EntryFlag
from patchclamp_server.interventions.compiled_edits import edit_rows
from patchclamp_server.interventions.row_arithmetic import interpolate, row_dots, row_norms
from patchclamp_server.interventions.setting import Setting
from patchclamp_server.model.arrays import BoolArray, IntArray
from patchclamp_server.model.sites import Site


@dataclass(eq=False)
class StepContext:
    """The rules of one part of a plan share this in one forward pass."""

    positions: Tensor  # [T]
    latch: Tensor  # [rows of Tables]
    # The openness of every condition at every row that has one, flat; the last is always 1 and stands for "no gate".
    opened: Tensor
    readings: Tensor  # flat, as Report.reading_rows says


class Rule(Protocol):
    def run(self, x: Tensor, context: StepContext) -> None: ...


class CompiledRead(ABC):
    """A rule that only reads, and can do so within the compiled blocks."""

    @abstractmethod
    def run(self, x: Tensor, context: StepContext) -> None: ...

    @abstractmethod
    def reads(self, readings: Tensor) -> list[Read]:
        """Returns what does the same as `run`, again and again: `readings` is that of every step's context."""


class CompiledEdit(ABC):
    """A rule that edits, and may do so within the compiled blocks."""

    @abstractmethod
    def run(self, x: Tensor, context: StepContext) -> None: ...

    @abstractmethod
    def write(self, opened: Tensor) -> Read | None:
        """Returns what does the same as `run`, again and again: `opened` is that of every step's context. None where
        there is nothing compiled that does."""


@dataclass(frozen=True, eq=False)
class Notes:
    """What edits have done in a step: |delta|, |h| and openness, 0 or 1, of each pair of an edit and a row, [E], in the
    order of execution."""

    delta_norms: Tensor
    norms: Tensor
    gates: Tensor

    @classmethod
    def of(cls, n: int, device: torch.device) -> "Notes":
        return cls(*torch.ones((3, n), device=device).unbind(0))

    def part(self, start: int, end: int) -> "Notes":
        """Returns those of pairs [start, end), at the same place in memory."""
        return Notes(self.delta_norms[start:end], self.norms[start:end], self.gates[start:end])


@dataclass(frozen=True, eq=False)
class Pairs:
    """All pairs of a part, sorted into groups, which are ranges of them. Arrays are on the host, tensors with x."""

    entry: IntArray  # [E]
    row: IntArray  # [E] row of the batch
    rows: Tensor  # [E], the same
    strength: Tensor  # [E]
    # The index of an edit's gate, or of a condition's value, in StepContext.opened; of a reading in `readings`.
    target: Tensor  # [E]
    gated: BoolArray  # [E]
    inside: Tensor  # [E] bool; true for all but latched conditions that look at no token of their scope
    # [E]: where edits find what they take from an earlier site; None where none does. And which do.
    readings: Tensor | None
    taking: BoolArray  # [E]


class Entries:
    """Holds the pairs [start, end) of a part: entries of one kind at one place."""

    def __init__(
        self, pairs: Pairs, setting: Setting, site: Site, layer: int, start: int, end: int, notes: Notes | None = None
    ) -> None:
        """`notes`: of edits, where what they do is noted."""
        self.setting, self.site, self.layer, self.notes = setting, site, layer, notes
        self.host = setting.tables.host
        self.pairs, self.span = pairs, slice(start, end)
        self.entry, self.row = pairs.entry[self.span], pairs.row[self.span]
        self.rows, self.strength = pairs.rows[self.span], pairs.strength[self.span]
        fresh = np.empty(end - start, dtype=np.bool_)
        fresh[0] = True
        np.not_equal(self.entry[1:], self.entry[:-1], out=fresh[1:])
        self.own = self.entry[fresh]  # [k] the entries, ascending
        # [E]: which of the k entries; None when each is at one row.
        self.which = None if len(self.own) == len(self.entry) else np.cumsum(fresh) - 1
        self.gate = pairs.target[self.span] if pairs.gated[self.span].any() else None

    def __len__(self) -> int:
        return len(self.entry)

    @cached_property
    def numbers(self) -> tuple[IntArray, IntArray, NDArray[np.float32]]:
        """What compiled loops read, [E] each: rows of the batch, which of the k entries, strengths."""
        which = np.arange(len(self)) if self.which is None else self.which
        rows: IntArray = np.ascontiguousarray(self.row, dtype=np.int64)
        return rows, which.astype(np.int64), self.strength.numpy()

    def opened(self, context: StepContext) -> Tensor:
        return self.always if self.gate is None else context.opened.index_select(0, self.gate)

    def note(self, delta_norms: Tensor, norms: Tensor, opened: Tensor) -> None:
        """Notes |delta|, |h| and openness of the pairs, [E] each, of edits."""
        notes = self.notes
        assert notes is not None
        notes.delta_norms.copy_(delta_norms)
        notes.norms.copy_(norms)
        if self.gate is not None:
            notes.gates.copy_(opened)

    @cached_property
    def always(self) -> Tensor:
        return torch.ones(len(self), device=self.setting.device)

    @cached_property
    def index(self) -> Tensor | None:
        """`which` as a tensor."""
        return None if self.which is None else self.tensor(self.which)

    def each(self, values: Tensor) -> Tensor:
        """Spreads values [k, ...] of the entries to their pairs [E, ...]."""
        return values if self.index is None else values.index_select(0, self.index)

    def ints(self, column: int) -> IntArray:
        """Returns a column of the k entries."""
        values: IntArray = self.host.ints[self.own, column].astype(np.int64)
        return values

    def floats(self, column: int) -> Tensor:
        """Returns a column of the E pairs."""
        return self.tensor(self.host.floats[self.entry, column])

    @property
    def width(self) -> int:
        return self.setting.widths[self.site]

    def vectors(self) -> Tensor:
        """Returns the vector of each of the k entries, [k, width]."""
        return self.bank(self.ints(FIRST), self.width)

    def bank(self, rows: IntArray, width: int) -> Tensor:
        """Returns vectors [n, width] in float32: sums over them would overflow or round in a narrower dtype."""
        return self.setting.tables.bank(width).data.index_select(0, self.tensor(rows)).float()

    def dots(self, x: Tensor) -> Tensor:
        """Returns the products h · v of the pairs, [E], of x [T, width] and the vectors of the entries."""
        if holds_for(x):
            rows, which, _ = self.numbers
            return pair_dots(x, rows, which, self.own_vectors)
        return row_dots(x.index_select(0, self.rows).float(), self.each(self.own_vectors))

    @cached_property
    def own_vectors(self) -> Tensor:
        """The same as `vectors()`, kept."""
        return self.vectors().contiguous()

    def tensor(self, array: np.ndarray) -> Tensor:
        return torch.from_numpy(np.ascontiguousarray(array)).to(self.setting.device)

    @cached_property
    def earlier(self) -> tuple[Tensor, Tensor] | None:
        """Pairs (later, earlier) of entries at one row, where edits that commute run as one; None when no row has two.

        The entries of a row are in the order of its program.
        """
        order = np.argsort(self.row, kind="stable")
        ordered = self.row[order]
        later, earlier = [], []
        for distance in range(1, int(np.bincount(ordered - ordered[0]).max())):
            same = ordered[distance:] == ordered[:-distance]
            later.append(order[distance:][same])
            earlier.append(order[:-distance][same])
        if not later:
            return None
        return self.tensor(np.concatenate(later)), self.tensor(np.concatenate(earlier))


class FeatureValues:
    """Makes features of the projections of entries that have their rows of the encoder for vectors."""

    def __init__(self, entries: Entries, which: np.ndarray) -> None:
        self.which = entries.tensor(which)  # [E] bool
        self.bias, self.jump = entries.floats(HIGH), entries.floats(SPARE)

    @classmethod
    def of(cls, entries: Entries) -> "FeatureValues | None":
        """Returns None where there are none."""
        which = entries.host.ints[entries.entry, FLAGS] & EntryFlag.FEATURE != 0
        return cls(entries, which) if which.any() else None

    def among(self, values: Tensor) -> Tensor:
        """Returns p where p is above the jump, else 0, with p = value + bias; values [E] of other entries stay."""
        p = values + self.bias
        return torch.where(self.which, torch.where(p <= self.jump, 0.0, p), values)


class Units:
    """Holds the neurons or heads of entries: U units, with those of a pair one after the other."""

    def __init__(self, entries: Entries, in_row: int) -> None:
        """`in_row` is the number of units in a row of x."""
        self.entries = entries
        ints = entries.host.ints[entries.entry]
        counts = ints[:, COUNT].astype(np.int64)
        self.pair = np.repeat(np.arange(len(counts)), counts)  # [U]
        within = np.arange(len(self.pair)) - np.repeat(np.cumsum(counts) - counts, counts)
        self.within = within
        self.number = ints[:, FIRST].astype(np.int64)[self.pair] + within  # [U] row of the units' columns
        unit = entries.host.unit_ints[self.number, UNIT]
        self.place = entries.tensor(entries.row[self.pair] * in_row + unit)  # [U] flat index of x
        # What compiled loops read: where the units of each pair begin, and which they are.
        self.numbered = np.concatenate(([0], np.cumsum(counts))), unit.astype(np.int64)
        self.group = entries.tensor(self.pair)

    def ints(self, column: int) -> IntArray:
        values: IntArray = self.entries.host.unit_ints[self.number, column].astype(np.int64)
        return values

    def numbers(self, column: int) -> Tensor:
        return self.entries.tensor(self.entries.host.unit_numbers[self.number, column])

    @cached_property
    def strength(self) -> Tensor:
        return self.entries.strength.index_select(0, self.group)

    def opened(self, opened: Tensor) -> Tensor:
        return opened.index_select(0, self.group)

    def norms_before(self, norms: Tensor, energy: Tensor) -> Tensor:
        """Returns the |h| that each entry was given: that of the row, changed by the entries before it. `energy` [U] is
        what |h|² gained."""
        if self.entries.earlier is None:
            return norms
        later, earlier = self.entries.earlier
        gained = torch.zeros_like(norms).index_add_(0, self.group, energy)
        return norms.square().index_add_(0, later, gained.index_select(0, earlier)).clamp_min_(0.0).sqrt_()

    def moved(self, norms: Tensor, squares: Tensor) -> Tensor:
        """Returns |delta| of each pair; `squares` [U] are the squared differences."""
        return torch.zeros_like(norms).index_add_(0, self.group, squares).sqrt()


class TargetRule(CompiledEdit):
    """Computes h + s (t(h) - h), with the norm kept if asked; subclasses give t. A row has at most one entry.

    Subclasses with a `formula` of compiled_edits.py, with `vectors` [k, width] and `bounds` [E], run as a compiled loop
    where it holds, with the same bits.
    """

    formula: int | None = None
    vectors: Tensor
    bounds: tuple[Tensor, Tensor]

    def __init__(self, entries: Entries, *, preserve_norm: bool) -> None:
        self.entries = entries
        self.preserve_norm = preserve_norm

    def target(self, h: Tensor, norms: Tensor) -> Tensor:
        raise NotImplementedError

    def run(self, x: Tensor, context: StepContext) -> None:
        entries = self.entries
        if self.formula is not None and holds_for(x):
            opened = entries.opened(context)
            numbers = self.formula, x, entries, self.vectors, self.bounds, opened
            entries.note(*edit_rows(*numbers, preserve_norm=self.preserve_norm), opened)
            return
        h = x.index_select(0, entries.rows).float()
        norms = row_norms(h)
        edited = interpolate(h, self.target(h, norms), entries.strength[:, None])
        if self.preserve_norm:
            reached = row_norms(edited)
            # A strength of 0 must leave the bits alone, and x * (n / n) may not; no factor rescales an empty row.
            fixed = (entries.strength == 0) | (reached == 0)
            scale = torch.where(fixed, torch.ones_like(reached), norms / reached)
            edited = edited * scale[:, None]
        opened = entries.opened(context)
        if entries.gate is not None:
            edited = torch.where(opened[:, None] > 0, edited, h)
        x.index_copy_(0, entries.rows, edited.to(x.dtype))
        entries.note(row_norms(edited - h), norms, opened)

    def write(self, opened: Tensor) -> Read | None:
        if self.formula is None:
            return None
        numbers = self.formula, self.vectors, self.bounds
        return compiled_writes.edit_rows(self.entries, *numbers, opened, preserve_norm=self.preserve_norm)


class Grid:
    """Arranges the pairs of k entries as [k, most pairs of one entry], so that all entries form one batched product."""

    def __init__(self, entries: Entries) -> None:
        which = np.arange(len(entries)) if entries.which is None else entries.which
        counts = np.bincount(which)
        self.shape = (len(counts), int(counts.max()))
        starts = np.cumsum(counts) - counts
        self.place = entries.tensor(which * self.shape[1] + np.arange(len(which)) - starts[which])

    def spread(self, h: Tensor) -> Tensor:  # [E, width] -> [k, most, width]
        k, most = self.shape
        grid = torch.zeros((k * most, h.shape[1]), dtype=h.dtype, device=h.device)
        return grid.index_copy_(0, self.place, h).view(k, most, -1)

    def collect(self, grid: Tensor) -> Tensor:  # [k, most, n] -> [E, n]
        return grid.reshape(-1, grid.shape[2]).index_select(0, self.place)
