"""Holds the products of the blocks under sparse policies, which are made when the first request needs them."""

import threading
from collections.abc import Callable, Sequence

from patchclamp_server.sparsity.apply import Rows, Step
from patchclamp_server.sparsity.blocks import SparseBlock, sparse_blocks
from patchclamp_server.sparsity.mlp import SparseModel
from patchclamp_server.sparsity.products import CompactBudget, GatheredMlp, SparseProducts


class SparseBlocks:
    """The engine's thread alone calls `follow`; any thread may call `prepare`, so that no step has to wait."""

    def __init__(self, model: SparseModel, products: Callable[[SparseModel], Sequence[SparseProducts]]) -> None:
        self.model = model
        self._products = products
        self._step = Step()
        self._lock = threading.Lock()
        self._blocks: list[SparseBlock] | None = None

    def prepare(self) -> list[SparseBlock]:
        with self._lock:
            if self._blocks is None:
                self._blocks = sparse_blocks(self.model, self._step, self._products(self.model))
            return self._blocks

    def follow(self, rows: Sequence[Rows]) -> list[SparseBlock] | None:
        """Returns the products of the blocks for a step with these rows under policies; None, the dense ones, where
        there are no such rows."""
        if not rows:
            return None
        blocks = self.prepare()
        self._step.rows = rows
        self._step.active.clear()
        return blocks


def gathered_products(model: SparseModel) -> list[SparseProducts]:
    """Returns the products for the CPU. Compiles what is compiled at run time."""
    budget = CompactBudget()
    products: list[SparseProducts] = []
    for weights, block in zip(model.layers, model.decoder.blocks, strict=True):
        assert weights.up is not None
        products.append(GatheredMlp.of(block, model.spec, budget))
    for layer in products[:1]:
        assert isinstance(layer, GatheredMlp)
        layer.mlp.warm_up()
    return products
