"""Attention mass, a block of queries at a time, against the full attention matrices of transformers."""

import pytest
import torch
from engine_runs import loaded
from tiny_models import FAMILIES, VOCAB, WINDOW, tiny_model
from torch import Tensor

from patchclamp_server.analysis.heads import attention_mass as module
from patchclamp_server.analysis.heads.attention_mass import NOWHERE, attention_mass
from patchclamp_server.analysis.heads.scores.repeated_tokens import random_positions

LENGTH = 37
TOLERANCE = 1e-5


def matrices(family: str, tokens: Tensor) -> Tensor:
    """[n_layers, n_heads, T, T]."""
    with torch.no_grad():
        attentions = tiny_model(family)(tokens[None], output_attentions=True).attentions
    return torch.stack(attentions)[:, 0]


def tokens(seed: int = 0) -> Tensor:
    return torch.randint(3, VOCAB, (LENGTH,), generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("block", [1, 5, 64])
@pytest.mark.parametrize("family", FAMILIES)
def test_mass_is_an_entry_of_the_attention_matrix(family: str, block: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "BLOCK", block)
    generator = torch.Generator().manual_seed(1)
    queries = torch.arange(9, LENGTH)
    near, far = queries - 1, random_positions(queries, queries, generator)
    targets = torch.stack((near, far, queries), dim=1)
    mass = attention_mass(loaded(family).decoder, tokens(), targets)
    expected = matrices(family, tokens())[:, :, queries[:, None], targets]
    assert mass.shape == expected.shape
    assert (mass - expected).abs().max() <= TOLERANCE
    assert expected.std() > 0.01


def test_a_target_outside_the_sliding_window_gets_nothing() -> None:
    queries = torch.arange(WINDOW, LENGTH)
    targets = torch.stack((queries - WINDOW, queries - WINDOW + 1), dim=1)
    mass = attention_mass(loaded("mistral").decoder, tokens(), targets)
    assert (mass[..., 0] == 0).all()
    assert (mass[..., 1] > 0).all()


def test_nowhere_gets_nothing() -> None:
    mass = attention_mass(loaded("llama").decoder, tokens(), torch.tensor([[NOWHERE, LENGTH - 1]]))
    assert (mass[..., 0] == 0).all()
    assert (mass[..., 1] > 0).all()


def test_the_weights_of_a_query_sum_to_one() -> None:
    every = torch.arange(LENGTH).expand(LENGTH, -1)
    mass = attention_mass(loaded("gemma2").decoder, tokens(), every)
    torch.testing.assert_close(mass.sum(3), torch.ones(mass.shape[:3]))
