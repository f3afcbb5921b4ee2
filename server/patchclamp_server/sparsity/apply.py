"""Describes the rows of a step that policies are about: whose they are, which are prompts, and what was active in them.

The products of the blocks (blocks.py) follow a `Step`: every row by its own policy, in one batch.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from patchclamp_server.sparsity.policy import Selector, SequenceState

NO_NEURONS = torch.empty(0, dtype=torch.int64)
# These neurons are computed whatever the policy says, by layer; None stands for all.
Forced = Mapping[int, Tensor | None]


@dataclass(frozen=True, eq=False)
class Rows:
    """Rows of one sequence in a step: `prompt` rows are dense and observed, a policy selects for the others.

    `forced` neurons are clamped or watched, so always active.
    """

    rows: slice
    selector: Selector
    state: SequenceState
    prompt: bool = False
    forced: Forced = field(default_factory=dict)

    def is_dense(self, layer: int) -> bool:
        return self.prompt or self.selector.is_dense(layer) or self.forced.get(layer, NO_NEURONS) is None

    def with_forced(self, layer: int, mask: Tensor) -> Tensor:
        """Returns mask [..., d_ff] with the forced neurons added."""
        forced = self.forced.get(layer)
        if forced is None or not len(forced):
            return mask
        mask = mask.clone()
        mask[..., forced] = True
        return mask


class Step:
    """The rows of the step that runs next, and what was active in it: (active, all) neurons or channels, by layer and
    by what was selected from: "neurons", or the projection whose inputs they are.
    """

    def __init__(self, rows: Sequence[Rows] = ()) -> None:
        self.rows = rows
        self.active: dict[tuple[int, str], tuple[int | Tensor, int]] = {}

    @property
    def rows(self) -> Sequence[Rows]:
        return self._rows

    @rows.setter
    def rows(self, rows: Sequence[Rows]) -> None:
        self._rows = rows
        self._sparse: dict[int, list[Rows]] = {}
        self._thinned: dict[int, list[Rows]] = {}
        self.prompts = [part for part in rows if part.prompt]

    def sparse(self, layer: int) -> list[Rows]:
        if layer not in self._sparse:
            self._sparse[layer] = [part for part in self.rows if not part.is_dense(layer)]
        return self._sparse[layer]

    def thinned(self, layer: int) -> list[Rows]:
        """Returns those of `sparse` whose policies are about channels."""
        if layer not in self._thinned:
            self._thinned[layer] = [part for part in self.sparse(layer) if part.selector.thins_channels]
        return self._thinned[layer]

    def count(self, part: Rows, layer: int, kind: str, active: int | Tensor, of: tuple[int, int]) -> None:
        """Counts that `active` of the (n, width) neurons or channels of n rows are computed."""
        rows, width = of
        before, among = self.active.get((layer, kind), (0, 0))
        self.active[layer, kind] = before + active, among + rows * width
        # This is the share of a block's products that the selection is about.
        weight = part.selector.shares.get(kind, 1.0)
        state = part.state
        state.active[layer] = state.active.get(layer, 0.0) + active * (weight / width)
        state.selected[layer] = state.selected.get(layer, 0.0) + weight * rows


def forced_neurons(*sets: Sequence[int]) -> Tensor:
    """Returns the union of clamped and watched neurons of a layer, as `Rows.forced` takes it."""
    return torch.tensor(sorted(set().union(*sets)), dtype=torch.int64)
