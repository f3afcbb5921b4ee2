"""What torch runs of features: the edit, and the readout of the k largest."""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from patchclamp_server.cpu.invariant import operators as invariant
from patchclamp_server.interventions.banks import ZERO_ROW
from patchclamp_server.interventions.columns import (
    BIAS,
    COUNT,
    FACTOR,
    FIRST,
    HIGH,
    JUMP,
    LOW,
    OFFSET,
    OTHER,
    UNIT,
    EntryFlag,
)
from patchclamp_server.interventions.encoders import WholeEncoder
from patchclamp_server.interventions.kinds.rankings import RankingRule
from patchclamp_server.interventions.kinds.rules import Entries, Grid, StepContext, TargetRule
from patchclamp_server.interventions.row_arithmetic import add_product


class Latents:
    """Holds the features of k entries; those with fewer than `most` are padded by features that are never active.

    f_i = p where p > jump_i, else 0, with p = h · E_i + bias_i.
    """

    def __init__(self, entries: Entries) -> None:
        first, count = entries.ints(FIRST), entries.ints(COUNT)
        place = np.arange(int(count.max()))
        padding = place >= count[:, None]  # [k, most]
        self._entries, self._padding = entries, padding
        self._number = np.where(padding, 0, first[:, None] + place)
        self.encoder = self.vectors(OTHER)  # [k, most, width]
        self.bias, self.jump = self.numbers(BIAS), self.numbers(JUMP)  # [k, most]
        # [E]: the entry that a row belongs to.
        self.owner = entries.tensor(np.arange(len(count))) if entries.index is None else entries.index
        self.grid = Grid(entries)

    def vectors(self, column: int) -> Tensor:
        rows = np.where(self._padding, ZERO_ROW, self._entries.host.unit_ints[self._number, column])
        width = self._entries.width
        return self._entries.bank(rows.reshape(-1).astype(np.int64), width).view(*rows.shape, width)

    def numbers(self, column: int) -> Tensor:
        """Returns a column [k, most], 0 where features pad."""
        numbers = np.where(self._padding, np.float32(0), self._entries.host.unit_numbers[self._number, column])
        return self._entries.tensor(numbers)

    @property
    def padding(self) -> Tensor:
        return self._entries.tensor(self._padding)

    def values(self, h: Tensor) -> Tensor:
        """Returns f [E, most] of rows h [E, width]."""
        if invariant.holds_for(h):
            p = invariant.affine(h, self.owner, self.encoder, self.bias)
        else:
            p = self.grid.collect(torch.baddbmm(self.bias[:, None], self.grid.spread(h), self.encoder.transpose(1, 2)))
        return torch.where(p <= self._entries.each(self.jump), 0.0, p)


class FeatureRule(TargetRule):
    """Has the target t(h) = h + Σ_i (clip(factor f_i + offset, low, high) - f_i) D_i."""

    def __init__(self, entries: Entries, flags: EntryFlag) -> None:
        super().__init__(entries, preserve_norm=bool(flags & EntryFlag.PRESERVE_NORM))
        self.latents = latents = Latents(entries)
        self.decoder = latents.vectors(UNIT)
        self.factor, self.offset = (entries.each(latents.numbers(column)) for column in (FACTOR, OFFSET))
        self.low, self.high = (entries.floats(column)[:, None] for column in (LOW, HIGH))
        self.padding = entries.each(latents.padding)
        # The features of transcoders were read at an earlier site.
        pairs, span = entries.pairs, entries.span
        self.taken: Tensor | None = None
        if pairs.readings is not None and pairs.taking[span].any():
            place = torch.arange(self.padding.shape[1], device=self.padding.device)
            self.taken = entries.tensor(pairs.taking[span])[:, None] & ~self.padding
            self.where = torch.where(self.taken, pairs.readings[span][:, None] + place, 0)
        self.given: Tensor | None = None

    def run(self, x: Tensor, context: StepContext) -> None:
        self.given = context.readings
        super().run(x, context)

    def target(self, h: Tensor, norms: Tensor) -> Tensor:
        f, latents = self.latents.values(h), self.latents
        if self.taken is not None:
            assert self.given is not None
            f = torch.where(self.taken, self.given[self.where], f)
        goal = torch.minimum(torch.maximum(add_product(self.offset, f, self.factor), self.low), self.high)
        # A bound may lie above the 0 of what pads.
        change = torch.where(self.padding, 0.0, goal - f)
        if invariant.holds_for(h):
            return invariant.add_rows(h, latents.owner, change, self.decoder)
        return h + latents.grid.collect(torch.bmm(latents.grid.spread(change), self.decoder))


class TopFeaturesRule(RankingRule):
    """Reads the k largest features that are above 0, the largest first."""

    def __init__(self, entries: Entries, flags: EntryFlag) -> None:
        super().__init__(entries, flags)
        objects = entries.setting.tables.objects
        self.encoders: dict[WholeEncoder, Tensor] = {}
        held = [objects[number] for number in entries.host.ints[entries.entry, FIRST].tolist()]
        for encoder in dict.fromkeys(held):
            assert isinstance(encoder, WholeEncoder)
            self.encoders[encoder] = entries.tensor(np.flatnonzero([own is encoder for own in held]))

    def read(self, h: Tensor) -> tuple[Tensor, Tensor]:
        values = torch.zeros(len(h), self.k, device=h.device)
        ids = torch.zeros(len(h), self.k, dtype=torch.int64, device=h.device)
        for encoder, pairs in self.encoders.items():
            own, features = encoder.largest(h.index_select(0, pairs).float(), self.k)
            n = own.shape[1]
            values[pairs, :n], ids[pairs, :n] = own, features
        return values, ids

    def found(self, end: Tensor) -> list[tuple[Sequence[float], tuple[int, ...]]]:
        above = []
        for values, ids in super().found(end):
            n = sum(value > 0 for value in values)
            above.append((values[:n], ids[:n]))
        return above
