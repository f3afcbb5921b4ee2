"""TEAL's greedy allocation of one block: which of its four products can give up inputs at least cost.

Each step takes STEP / (the product's share of the block's weights) off the product with which ‖block(x) - block₀(x)‖²
is least, so every step lowers the share that the block keeps by STEP. The path of shares serves every keep ratio. The
norm is over the tokens that interventions/pooling.py takes for ordinary: the squares of one attention sink would
outweigh all others.
"""

import torch
from torch import Tensor

from patchclamp_server.analysis.documents import forward, inputs_of, pool_for
from patchclamp_server.engine.exclusive import Sliced
from patchclamp_server.interventions.pooling import ordinary_tokens
from patchclamp_server.sparsity.apply import Rows, Step
from patchclamp_server.sparsity.blocks import SparseBlock, sparse_blocks
from patchclamp_server.sparsity.mlp import MlpInput, SparseModel
from patchclamp_server.sparsity.policies.shares import threshold
from patchclamp_server.sparsity.policies.teal import STEP
from patchclamp_server.sparsity.policy import (
    ONLY_ACTIVE,
    PROJECTIONS,
    Cost,
    Selection,
    Selector,
    SequenceState,
    weight_shares,
)

# Nothing is left to allocate of a block that keeps less than this.
LEAST = 0.2


class _Trial(Selector):
    """Applies thresholds that keep `kept` of each product's inputs."""

    def __init__(self, model: SparseModel, grids: list[Tensor]) -> None:
        self.model = model
        self.profile = None
        self.keep = (0.0,) * model.n_layers
        self.kept = [1.0] * len(PROJECTIONS)
        self._grids = grids

    def channels(self, layer: int, projection: str, x: Tensor) -> Tensor | None:
        i = PROJECTIONS.index(projection)
        return None if self.kept[i] >= 1.0 else x.abs() >= threshold(self._grids[i], self.kept[i])

    def select(self, state: SequenceState, layer: int, mlp: MlpInput) -> Selection | None:
        return None

    def cost(self, layer: int, weight_bits: int = 16) -> Cost:
        return ONLY_ACTIVE


def greedy_path(
    model: SparseModel, layer: int, residual: Tensor, documents: int, grids: list[Tensor]
) -> Sliced[Tensor]:
    """Returns the shares kept by product after each step [steps, 4]. `residual` [documents · tokens, d] has the inputs
    of the block, the only one that is run."""
    decoder, alone = model.decoder, range(layer, layer + 1)
    # The run starts from residual states, so it does not matter which tokens these are.
    ids = torch.zeros(len(residual), dtype=torch.int64).view(documents, -1)
    trial = _Trial(model, grids)
    sparse = sparse_blocks(model, Step([Rows(slice(0, len(residual)), trial, trial.begin())]))
    inputs, pools = inputs_of(ids, 0, ids.shape[1], decoder), pool_for(decoder, ids, alone)

    def output(products: list[SparseBlock] | None, tokens: int) -> Sliced[Tensor]:
        return forward(decoder, inputs, pools, products=products, start=residual, layers=alone, tokens=tokens)

    target = yield from output(None, len(residual))
    ordinary = ordinary_tokens(target.view(documents, -1, target.shape[1])).flatten()
    shares = weight_shares(model.spec)
    kept = [1.0] * len(PROJECTIONS)
    path = [kept]
    while sum(k * share for k, share in zip(kept, shares, strict=True)) > LEAST + 1e-9:
        errors: list[tuple[float, list[float]]] = []
        for i, share in enumerate(shares):
            lowered = kept[i] - STEP / share
            if lowered < -1e-9:
                continue
            trial.kept = [*kept[:i], max(lowered, 0.0), *kept[i + 1 :]]
            # The tokens of the block have been paid for.
            change = (yield from output(sparse, 0)) - target
            error = float(change[ordinary].float().square().sum())
            errors.append((error, trial.kept))
        if not errors:
            break
        kept = min(errors)[1]
        path.append(kept)
    return torch.tensor(path)
