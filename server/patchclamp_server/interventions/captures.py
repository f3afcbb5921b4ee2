"""Hands rows of a step on to those that gather them."""

from torch import Tensor

from patchclamp_server.interventions.kinds.rules import StepContext
from patchclamp_server.interventions.pooling import RowSink


class CaptureRule:
    """Hands rows of a prompt, tokens from position `start` on, to their pool."""

    def __init__(self, pool: RowSink, layer: int, rows: slice, start: int) -> None:
        self.pool, self.layer, self.rows, self.start = pool, layer, rows, start

    def run(self, x: Tensor, context: StepContext) -> None:
        self.pool.add(self.layer, x[self.rows], self.start)
