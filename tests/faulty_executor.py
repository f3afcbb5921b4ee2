"""Forward passes that fail: what no production server has an option for."""

from collections.abc import Callable

import torch

from patchclamp_server.engine.batch import Executed, Executor, StepBatch

# float32 elements; no machine has room for them.
TOO_MANY = 10**16


class FaultyExecutor:
    """Runs steps, unless `fault` raises in one; it is called with the number of the step, from 0."""

    def __init__(self, executor: Executor, fault: Callable[[int], None]) -> None:
        self._executor, self._fault = executor, fault
        self.tables, self.sparse, self.trace = executor.tables, executor.sparse, executor.trace
        self.steps = 0

    def execute(self, batch: StepBatch) -> Executed:
        self.steps += 1
        self._fault(self.steps - 1)
        return self._executor.execute(batch)


def allocate_too_much() -> None:
    """Raises the error of the real allocator."""
    torch.empty(TOO_MANY)
