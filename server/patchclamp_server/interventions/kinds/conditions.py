"""The value of a condition (gates, aborts) is h·u, the cosine, or a feature: p = h·u + bias above its jump, else 0.

It holds where sign · value > sign · threshold.
"""

import torch
from torch import Tensor

from patchclamp_server.interventions.columns import FLAGS, LATCH, LOW, EntryFlag
from patchclamp_server.interventions.kinds.rules import Entries, FeatureValues, StepContext
from patchclamp_server.interventions.row_arithmetic import row_norms

_NEVER = torch.iinfo(torch.int64).max


class ConditionRule:
    """Writes the openness of conditions; latches remember the position at which theirs first held."""

    def __init__(self, entries: Entries, flags: EntryFlag) -> None:
        self.entries = entries
        pairs, span = entries.pairs, entries.span
        self.sign = entries.strength  # [E]
        self.threshold = self.sign * entries.floats(LOW)
        self.target, self.inside = pairs.target[span], pairs.inside[span]
        ints = entries.host.ints[entries.entry]
        cosine = ints[:, FLAGS] & EntryFlag.COSINE != 0
        self.cosine = entries.tensor(cosine) if cosine.any() else None
        self.features = FeatureValues.of(entries)
        latched = ints[:, FLAGS] & EntryFlag.LATCHED != 0
        self.latched = entries.tensor(latched) if latched.any() else None
        self.latch = entries.tensor(ints[:, LATCH].astype("int64"))

    def run(self, x: Tensor, context: StepContext) -> None:
        value = self.entries.dots(x)
        if self.cosine is not None:
            norms = row_norms(x.index_select(0, self.entries.rows).float())
            value = torch.where(self.cosine, value / norms, value)
        if self.features is not None:
            value = self.features.among(value)
        opened = (self.sign * value > self.threshold) & self.inside
        if self.latched is not None:
            positions = context.positions.index_select(0, self.entries.rows)
            fired = torch.where(opened & self.latched, positions, _NEVER)
            context.latch.scatter_reduce_(0, self.latch, fired, "amin")
            since = context.latch.index_select(0, self.latch)
            opened = torch.where(self.latched, positions >= since, opened)
        context.opened.index_copy_(0, self.target, opened.to(context.opened.dtype))
