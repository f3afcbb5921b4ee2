"""Holds the products of the blocks under sparse policies, which are made when the first request needs them."""

import threading
from collections.abc import Callable, Sequence, Set

from patchclamp_server.model.sites import PREACTIVATION_SITES, Site
from patchclamp_server.sparsity.apply import Rows, Step
from patchclamp_server.sparsity.blocks import SparseBlock, sparse_blocks
from patchclamp_server.sparsity.glance_rows import GlanceRows
from patchclamp_server.sparsity.mlp import SparseModel
from patchclamp_server.sparsity.policy import Selector
from patchclamp_server.sparsity.products import CompactBudget, GatheredMlp, SparseProducts


class SparseBlocks:
    """The engine's thread alone calls `follow` and `glance`; any thread may call `prepare`, so that no step has to
    wait."""

    def __init__(self, model: SparseModel, products: Callable[[SparseModel], Sequence[SparseProducts]]) -> None:
        self.model = model
        self._products = products
        self._step = Step()
        self._lock = threading.Lock()
        self._blocks: list[SparseBlock] | None = None
        self._glance_rows: GlanceRows | None = None

    def prepare(self, selector: Selector) -> None:
        """Makes what the rows of a selector are computed by."""
        if selector.glanced is None:
            self._prepare()
        elif (compiled := self.model.decoder.compiled) is not None:
            with self._lock:
                compiled.round_unembedding()
                if self._glance_rows is None:
                    self._glance_rows = GlanceRows(self.model.spec, selector.glanced)

    def _prepare(self) -> list[SparseBlock]:
        with self._lock:
            if self._blocks is None:
                self._blocks = sparse_blocks(self.model, self._step, self._products(self.model))
            return self._blocks

    def glance(self, rows: Sequence[Rows], n: int, visited: Set[tuple[Site, int]] | None) -> GlanceRows | None:
        """Returns how compiled blocks compute the rows under policies of a step of n rows, where they can, or None."""
        if not rows or visited is None or any(part.prompt or part.selector.glanced is None for part in rows):
            return None
        # A set is chosen before the edits of gates and ups, which compiled blocks visit first.
        if self._glance_rows is None or any(site in PREACTIVATION_SITES for site, _ in visited):
            return None
        self._glance_rows.follow(rows, n)
        return self._glance_rows

    def follow(self, rows: Sequence[Rows]) -> list[SparseBlock] | None:
        """Returns the products of the blocks for a step with these rows under policies; None, the dense ones, where
        there are no such rows."""
        if not rows:
            return None
        # Those of a glance take no products of ours.
        glanced = all(part.selector.glanced is not None for part in rows)
        blocks = sparse_blocks(self.model, self._step) if glanced and self._blocks is None else self._prepare()
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
