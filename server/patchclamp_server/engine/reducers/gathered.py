"""Rows of a request, gathered from several steps before reducers take them.

Beside serving a step has few rows of analysis, and for few rows a reducer pays more for being called, and for its own
tensors that the products of the step have driven out of the caches, than for the rows. So about AT_ONCE rows of a layer
wait for each other, copied; layers by turns, so that no step pays for all of them.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from patchclamp_server.engine.reducers.reducer import Place, Reducer
from patchclamp_server.model.arrays import IntArray

AT_ONCE = 64
# Of a layer to the next one, so that neighbours are not due in the same step.
_APART = 16


class GatheredRows:
    """Gives the rows of one text at one site to reducers, each token once, all of them by its last token.

    In memory are less than AT_ONCE rows of each layer besides those of the step.
    """

    def __init__(self, reducers: Sequence[Reducer], text: int, label: int, ids: IntArray) -> None:
        """`ids`: of the whole text."""
        self.layers = tuple(sorted({layer for reducer in reducers for layer in reducer.layers}))
        self._reducers = {layer: [r for r in reducers if layer in r.layers] for layer in self.layers}
        self._text, self._label, self._ids = text, label, ids
        # By layer: rows that wait, with the token of the first of them; tokens that have come.
        self._waiting: dict[int, tuple[int, list[Tensor]]] = {}
        self._reached: dict[int, int] = {}

    def add(self, layer: int, states: Tensor, start: int) -> None:
        """states [n, width] of tokens start ≤ t < start + n. Tokens come in order, and again after a preemption."""
        fresh, end = max(start, self._reached.get(layer, 0)), start + len(states)
        if fresh >= end:
            return
        self._reached[layer] = end
        rows = states[fresh - start :]
        first, parts = self._waiting.pop(layer, (fresh, []))
        turn = _APART * layer
        if end < len(self._ids) and (end + turn) // AT_ONCE == (first + turn) // AT_ONCE:
            # A copy: the step goes on to change them.
            self._waiting[layer] = (first, [*parts, rows.clone()])
            return
        together = torch.cat([*parts, rows]) if parts else rows.contiguous()
        place = Place(self._text, first, self._label, self._ids)
        for reducer in self._reducers[layer]:
            reducer.add(layer, together, place)
