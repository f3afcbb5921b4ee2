"""The causal inner product: equal to numpy with the weights that transformers holds."""

from pathlib import Path

import numpy as np
import pytest
import torch
from engine_runs import loaded, started
from numpy.typing import NDArray
from tiny_models import tiny_model

from patchclamp_server.analysis.neurons.weights import Vocabulary
from patchclamp_server.analysis.steering.causal_inner_product import (
    CausalInnerProduct,
    causal_inner_product,
    direction_of,
)
from patchclamp_server.analysis.steering.result import Result
from patchclamp_server.artifacts.store import ArtifactStore
from patchclamp_server.model.decoder import Decoder
from patchclamp_server.model.sites import Site
from patchclamp_server.model.weights import decoder_from_transformers

NORMS = {"llama": "model.norm", "gpt2": "transformer.ln_f"}
POSITIVE, NEGATIVE = [5, 9, 20], [6, 14, 31]


def decoder(family: str) -> Decoder:
    return decoder_from_transformers(tiny_model(family), dtype=torch.float32, device="cpu")


def rows(family: str) -> NDArray[np.float64]:
    """[vocab, d]: what multiplies a state before the final norm, but for the divisor of the norm."""
    model = tiny_model(family)
    scaled = model.get_output_embeddings().weight.detach().double() * model.get_parameter(f"{NORMS[family]}.weight")
    found: NDArray[np.float64] = scaled.detach().numpy()
    # A layer norm takes the mean of the state away.
    return found - found.mean(1, keepdims=True) if family == "gpt2" else found


@pytest.mark.parametrize("family", NORMS)
def test_the_vector_is_the_inverse_covariance_times_the_mean_difference(family: str) -> None:
    vocabulary = Vocabulary.of(decoder(family))
    difference = (vocabulary.read_rows(torch.tensor(POSITIVE)) - vocabulary.read_rows(torch.tensor(NEGATIVE))).mean(0)
    found = direction_of(difference, vocabulary.read_covariance()).numpy()
    own = rows(family)
    expected = np.linalg.pinv(np.cov(own.T, bias=True)) @ (own[POSITIVE] - own[NEGATIVE]).mean(0)
    np.testing.assert_allclose(found, expected, rtol=2e-3, atol=2e-3 * np.abs(expected).max())


def test_a_concept_that_varies_independently_is_not_moved() -> None:
    """Rows are made of two independent concepts whose directions are far from orthogonal."""
    generator = torch.Generator().manual_seed(0)
    concepts = torch.tensor([[1.0, 0.0, 0.0], [0.9, 0.4, 0.0], [0.0, 0.0, 1.0]])
    vocabulary = torch.randn(20_000, 3, generator=generator) @ concepts
    covariance = torch.cov(vocabulary.T, correction=0)
    vector = direction_of(concepts[0], covariance)
    moved = torch.nn.functional.normalize(vector, dim=0) @ concepts.T
    assert float(moved[0]) > 0.3
    assert abs(float(moved[1])) < 0.05 * float(moved[0])
    # The difference of the rows itself moves the other concept nearly as much.
    assert float(concepts[0] @ concepts[1]) > 0.8


async def test_the_stored_vector_is_learned_from_the_pairs_that_the_seed_leaves(tmp_path: Path) -> None:
    tokens = tuple(zip(range(5, 45, 4), range(51, 91, 4), strict=True))
    model, store, own = loaded("llama"), ArtifactStore(tmp_path), rows("llama")
    directions = []
    for seed in (1, 2):
        words = tuple((str(a), str(b)) for a, b in tokens)
        job = CausalInnerProduct(tokens, words, Site.RESID_POST, (2,), holdout_fraction=0.3, seed=seed)
        with started(model) as engine:
            *_, result = [event async for event in causal_inner_product(engine, store, model.info, job)]
        assert isinstance(result, Result)
        order = torch.randperm(10, generator=torch.Generator().manual_seed(seed)).tolist()
        differences = np.stack([own[a] - own[b] for a, b in (tokens[i] for i in order[:7])])
        expected = np.linalg.pinv(np.cov(own.T, bias=True)) @ differences.mean(0)
        found = store.get(result.artifact.id).direction(2).numpy()
        np.testing.assert_allclose(found, expected, rtol=2e-3, atol=2e-3 * np.abs(expected).max())
        assert (result.artifact.evidence["training_pairs"], result.artifact.evidence["heldout_pairs"]) == (7, 3)
        # Of the held-out words, by the midpoint of those that were learned from.
        sides = [own[[tokens[i][side] for i in order]] @ expected for side in (0, 1)]
        middle = (sides[0][:7].mean() + sides[1][:7].mean()) / 2
        accuracy = ((sides[0][7:] > middle).mean() + (sides[1][7:] < middle).mean()) / 2
        assert result.layers[0].heldout_accuracy == pytest.approx(accuracy)
        directions.append(found)
    assert not np.allclose(*directions, rtol=1e-2)
