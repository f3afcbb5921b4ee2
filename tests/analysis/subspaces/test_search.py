"""What a search for planes finds in a model, against plain transformers with hooks."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from engine_runs import loaded, started
from oracle_sites import attach
from programs import prompt
from tiny_models import tiny_model
from torch import Tensor

from patchclamp_server.analysis.subspaces.circular_plane import circular_plane
from patchclamp_server.analysis.subspaces.job import (
    FoundSubspace,
    PlaneSearch,
    ScopedPrompt,
    SubspaceSearch,
    find_subspace,
)
from patchclamp_server.artifacts.store import ArtifactStore
from patchclamp_server.engine.config import EngineConfig
from patchclamp_server.model.sites import Site

SITE, LAYERS = Site.RESID_POST, (0, 1, 2)
VALUES = 5


@torch.no_grad()
def states(tokens: Sequence[int]) -> dict[int, Tensor]:
    """[T, width] of every layer."""
    kept: dict[int, Tensor] = {}

    def visit(site: Site, layer: int, x: Tensor) -> Tensor:
        if site is SITE:
            kept[layer] = x.reshape(len(tokens), -1).double()
        return x

    model = tiny_model("llama")
    hooks = attach(model, visit)
    model(input_ids=torch.tensor([list(tokens)]), use_cache=False)
    for hook in hooks:
        hook.remove()
    return kept


async def test_planes_are_those_of_mean_states_and_the_most_circular_is_the_best(tmp_path: Path) -> None:
    """Of a value its texts count alike, whatever their lengths and their numbers of tokens in scope."""
    prompts = []
    for value in range(VALUES):
        own = [prompt(f"value {value} {i}", 5 + 4 * i) for i in range(1 + value % 3)]
        prompts.append(tuple(ScopedPrompt(ids, np.arange(len(ids)) % 3 == 1) for ids in own))
    search = PlaneSearch(tuple(map(str, range(VALUES))), tuple(prompts), components=4)
    job, store, model = SubspaceSearch(search, SITE, LAYERS, seed=3), ArtifactStore(tmp_path), loaded("llama")
    # Prompts are computed in chunks.
    with started(model, EngineConfig(max_tokens_per_step=4, kv_block_size=4)) as engine:
        *_, found = [event async for event in find_subspace(engine, store, model.info, job)]
    assert isinstance(found, FoundSubspace)
    stored = store.get(found.artifact.id)
    for evidence in found.layers:
        means = torch.stack(
            [
                torch.stack(
                    [states(each.ids)[evidence.layer][torch.from_numpy(each.chosen)].mean(0) for each in own]
                ).mean(0)
                for own in prompts
            ]
        )
        plane = circular_plane(means, 4, 3)
        assert plane is not None
        assert evidence.circularity == pytest.approx(plane.circularity, rel=1e-3)
        assert evidence.shuffled_circularity == pytest.approx(plane.shuffled_circularity, rel=1e-3)
        axes = stored.subspace(evidence.layer).rotation
        torch.testing.assert_close(axes.T @ axes, plane.axes.T @ plane.axes, rtol=1e-2, atol=1e-3)
        centre = stored.subspace(evidence.layer).centre
        torch.testing.assert_close(centre, plane.centre, rtol=1e-3, atol=1e-4)
    circularities = [each.circularity for each in found.layers]
    assert len(set(circularities)) == len(LAYERS)
    assert found.best_layer == LAYERS[int(np.argmax(circularities))]
