"""Measures the damage that layers take from being sparse, as fovea's budget needs it: both of its parts,
policies/budgets.py.

Squared errors come from a sample of the inputs of a layer, and are work at the exclusive door; divergences come from
requests with one layer alone sparse.
"""

from collections.abc import AsyncGenerator
from contextlib import aclosing
from dataclasses import replace

import torch
from torch import Tensor

from patchclamp_server.analysis.progress import Progress, Steps
from patchclamp_server.analysis.sparsity.evaluate import scored
from patchclamp_server.engine.engine import Engine
from patchclamp_server.engine.exclusive import Slice, Sliced
from patchclamp_server.interventions.pooling import outliers
from patchclamp_server.sparsity.mlp import MlpInput, SparseModel
from patchclamp_server.sparsity.policies.budgets import GRID, REFERENCE, damage_curves
from patchclamp_server.sparsity.policies.fovea import Fovea
from patchclamp_server.sparsity.profile import Profile

# So many rows are taken of a layer's sample.
ROWS = 128
# This tensor stands for the damage until divergences are known.
SQUARED_ERRORS = "squared_errors"


def squared_errors(policy: Fovea, model: SparseModel, profile: Profile, samples: list[Tensor]) -> Sliced[Tensor]:
    """Returns ε² [n_layers, GRID] of policies/budgets.py."""
    errors = []
    for layer, x in enumerate(samples):
        mlp = MlpInput(x[:: max(1, len(x) // ROWS)], model.layers[layer])
        down, row = mlp.weights.down, []
        ordinary = ~outliers((mlp.neurons @ down).norm(dim=1))
        for keep in GRID:
            yield Slice(len(mlp.neurons))
            selector = replace(policy, keep_ratio=keep).bind(model, profile)
            selection = selector.select(selector.begin(), layer, mlp)
            error = mlp.neurons.masked_fill(selection.active, 0.0) @ down
            if selection.remainder is not None:
                error -= selection.remainder(selection.active)
            row.append(float(error[ordinary].float().square().sum()))
        errors.append(row)
    return torch.tensor(errors)


async def measure_damage(
    policy: Fovea, documents: Tensor, engine: Engine, tensors: dict[str, Tensor], steps: Steps
) -> AsyncGenerator[Progress | dict[str, Tensor], None]:
    """Yields progress, then the tensors with D [n_layers, GRID] of policies/budgets.py: of every layer alone at
    REFERENCE, what it does to documents [n, tokens], of which the first half is the prompt."""
    model = engine.sparse_model
    kept = {name: tensor for name, tensor in tensors.items() if name != SQUARED_ERRORS}
    profile, layers = Profile(policy.name, model.fingerprint, kept), range(model.n_layers)
    alone = [tuple(REFERENCE if other == layer else 1.0 for other in layers) for layer in layers]
    selectors = [replace(policy, budget="uniform", keep_ratio=keep).bind(model, profile) for keep in alone]
    divergence = torch.zeros(model.n_layers, dtype=torch.float64)
    left = dict.fromkeys(layers, len(documents))
    async with aclosing(scored(engine, documents, documents.shape[1] // 2, selectors)) as found:
        async for layer, document in found:
            divergence[layer] += document.divergence / len(documents)
            left[layer] -= 1
            if not left[layer]:
                yield steps.advance()
    yield {**kept, "damage": damage_curves(divergence.float(), tensors[SQUARED_ERRORS])}
