"""The decoder under sparse policies, made when the first request needs it."""

import threading
from collections.abc import Callable, Sequence

from patchclamp_server.model.decoder import Decoder
from patchclamp_server.sparsity.apply import Rows, Step, sparse_decoder
from patchclamp_server.sparsity.mlp import SparseModel
from patchclamp_server.sparsity.products import CompactBudget, GatheredMlp, SparseProducts


class SparseDecoder:
    """`follow` belongs to the engine's thread; `prepare` may be called on any, so that no step has to wait."""

    def __init__(self, model: SparseModel, products: Callable[[SparseModel], Sequence[SparseProducts]]) -> None:
        self.model = model
        self._products = products
        self._step = Step()
        self._lock = threading.Lock()
        self._decoder: Decoder | None = None

    def prepare(self) -> Decoder:
        with self._lock:
            if self._decoder is None:
                self._decoder = sparse_decoder(self.model, self._step, self._products(self.model))
            return self._decoder

    def follow(self, rows: Sequence[Rows]) -> Decoder:
        """The decoder for a step with these rows."""
        decoder = self.prepare()
        self._step.rows = rows
        self._step.active.clear()
        return decoder


def gathered_products(model: SparseModel) -> list[SparseProducts]:
    """For the CPU. Compiles what is compiled at run time."""
    budget = CompactBudget()
    products: list[SparseProducts] = []
    for weights, block in zip(model.layers, model.decoder.blocks, strict=True):
        assert weights.up is not None
        products.append(GatheredMlp.of(block, model.spec, budget))
    for layer in products[:1]:
        assert isinstance(layer, GatheredMlp)
        layer.mlp.warm_up()
    return products
