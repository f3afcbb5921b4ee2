"""TEAL's greedy allocation of one block: which of its four products can give up inputs at least cost.

Each step takes STEP / (the product's share of the block's weights) off the product with which ‖block(x) - block₀(x)‖²
is least, so every step lowers the share that the block keeps by STEP. The path of shares serves every keep ratio. The
norm is over the tokens that pooling.py takes for ordinary: the squares of one attention sink would outweigh all others.
"""

from dataclasses import replace

import torch
from torch import Tensor

from patchclamp_server.analysis.documents import NoHooks, inputs_of, pools_for
from patchclamp_server.interventions.pooling import ordinary_tokens
from patchclamp_server.model.decoder import Decoder
from patchclamp_server.sparsity.apply import Rows, Step, sparse_decoder
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

# Of a block that keeps less than this nothing is left to allocate.
LEAST = 0.2


class _Trial(Selector):
    """Thresholds that keep `kept` of each product's inputs."""

    def __init__(self, model: SparseModel, grids: list[Tensor]) -> None:
        self.model = model
        self.profile = None
        self.keep = (0.0,)
        self.kept = [1.0] * len(PROJECTIONS)
        self._grids = grids

    def channels(self, layer: int, projection: str, x: Tensor) -> Tensor | None:
        i = PROJECTIONS.index(projection)
        return None if self.kept[i] >= 1.0 else x.abs() >= threshold(self._grids[i], self.kept[i])

    def select(self, state: SequenceState, layer: int, mlp: MlpInput) -> Selection | None:
        return None

    def cost(self, layer: int, weight_bits: int = 16) -> Cost:
        return ONLY_ACTIVE


@torch.inference_mode()
def greedy_path(decoder: Decoder, layer: int, residual: Tensor, documents: int, grids: list[Tensor]) -> Tensor:
    """Shares kept by product after each step [steps, 4]. `residual` [documents · tokens, d]: inputs of the block."""
    spec = decoder.spec
    # One block that starts from given residual states: they are its embeddings.
    one = replace(
        spec,
        n_layers=1,
        windows=(spec.windows[layer],),
        rotary_kinds=(spec.rotary_kinds[layer],),
        embedding_scale=1.0,
    )
    single = Decoder(
        one, residual, None, decoder.rotary, [decoder.blocks[layer]], decoder.final_norm, decoder.unembedding
    )
    model = SparseModel("", single)
    ids = torch.arange(len(residual)).view(documents, -1)
    trial = _Trial(model, grids)
    sparse = sparse_decoder(model, Step([Rows(slice(0, len(residual)), trial, trial.begin())]))
    inputs, pools = inputs_of(ids, 0, ids.shape[1], single), pools_for(single, ids)
    target = single.forward(inputs, pools, NoHooks())
    ordinary = ordinary_tokens(target.view(documents, -1, target.shape[1])).flatten()
    shares = weight_shares(spec)
    kept = [1.0] * len(PROJECTIONS)
    path = [kept]
    while sum(k * share for k, share in zip(kept, shares, strict=True)) > LEAST + 1e-9:
        errors: list[tuple[float, list[float]]] = []
        for i, share in enumerate(shares):
            lowered = kept[i] - STEP / share
            if lowered < -1e-9:
                continue
            trial.kept = [*kept[:i], max(lowered, 0.0), *kept[i + 1 :]]
            error = float((sparse.forward(inputs, pools, NoHooks()) - target)[ordinary].float().square().sum())
            errors.append((error, trial.kept))
        if not errors:
            break
        kept = min(errors)[1]
        path.append(kept)
    return torch.tensor(path)
