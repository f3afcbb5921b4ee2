"""Every extraction method finds a direction that was planted in synthetic activations."""

import pytest
import torch

from patchclamp_server.analysis.steering.registry import METHODS

PAIRS, LAYERS, WIDTH = 400, 3, 24
DISTANCE = 3.0


def planted(seed: int = 0) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """positive and negative [n, layers, d] around a common offset, apart by DISTANCE · planted [layers, d] (unit)."""
    generator = torch.Generator().manual_seed(seed)
    direction = torch.nn.functional.normalize(torch.randn(LAYERS, WIDTH, generator=generator), dim=-1)
    # Both sides of a pair share what they are about.
    topic = torch.randn(PAIRS, LAYERS, WIDTH, generator=generator) + 5
    noise = 0.5 * torch.randn(2, PAIRS, LAYERS, WIDTH, generator=generator)
    shift = DISTANCE / 2 * direction
    return topic + shift + noise[0], topic - shift + noise[1], direction


@pytest.mark.parametrize("name", METHODS)
def test_a_planted_direction_is_found_at_every_layer(name: str) -> None:
    positive, negative, direction = planted()
    cosines = torch.cosine_similarity(METHODS[name](positive, negative, 0), direction, dim=-1)
    assert cosines.min() > 0.95, cosines


@pytest.mark.parametrize("name", METHODS)
def test_the_positives_project_higher(name: str) -> None:
    positive, negative, _ = planted()
    swapped = METHODS[name](negative, positive, 0)
    assert ((positive - negative).mean(dim=0) * swapped).sum(dim=-1).max() < 0


@pytest.mark.parametrize("name", METHODS)
def test_strength_one_is_the_distance_between_the_means(name: str) -> None:
    positive, negative, _ = planted()
    distance = (positive.mean(dim=0) - negative.mean(dim=0)).norm(dim=-1)
    torch.testing.assert_close(METHODS[name](positive, negative, 0).norm(dim=-1), distance)


@pytest.mark.parametrize("name", METHODS)
def test_layers_do_not_influence_each_other(name: str) -> None:
    positive, negative, _ = planted()
    alone = METHODS[name](positive[:, 1:2], negative[:, 1:2], 0)[0]
    torch.testing.assert_close(METHODS[name](positive, negative, 0)[1], alone)


@pytest.mark.parametrize("name", METHODS)
def test_more_dimensions_than_pairs_are_no_obstacle(name: str) -> None:
    positive, negative, direction = planted()
    few = METHODS[name](positive[:12], negative[:12], 0)
    assert few.isfinite().all()
    assert torch.cosine_similarity(few, direction, dim=-1).min() > 0.5


@pytest.mark.parametrize("name", METHODS)
def test_equal_sides_have_no_direction(name: str) -> None:
    positive, _, _ = planted()
    assert not METHODS[name](positive, positive.clone(), 0).any()


def test_difference_of_means_moves_one_mean_onto_the_other() -> None:
    positive, negative, _ = planted()
    moved = negative.mean(dim=0) + METHODS["difference_of_means"](positive, negative, 0)
    torch.testing.assert_close(moved, positive.mean(dim=0))


def test_pca_of_differences_equals_the_first_right_singular_vector() -> None:
    positive, negative, _ = planted()
    found = METHODS["pca_of_differences"](positive, negative, 0)
    for layer in range(LAYERS):
        singular = torch.linalg.svd((positive - negative)[:, layer].double()).Vh[0].float()
        assert torch.cosine_similarity(found[layer], singular, dim=0).abs() > 1 - 1e-5


def test_the_probe_discounts_a_direction_that_varies_within_a_side() -> None:
    generator = torch.Generator().manual_seed(0)
    # The first coordinate separates the sides cleanly; the second differs as much on average, in loud noise.
    scale = torch.tensor([0.3, 6.0])
    shift = torch.tensor([1.0, 1.0])
    positive = (shift + scale * torch.randn(300, 2, generator=generator))[:, None]
    negative = (-shift + scale * torch.randn(300, 2, generator=generator))[:, None]
    probe = METHODS["logistic_probe"](positive, negative, 0)[0]
    assert abs(float(probe[1] / probe[0])) < 0.1


def test_the_normal_of_the_probe_is_that_of_the_activations() -> None:
    """The sides differ as much in both coordinates, by their own noise; a loud one is divided by its scale again."""
    generator = torch.Generator().manual_seed(0)
    scale = torch.tensor([0.5, 50.0])
    positive = (scale * (1.0 + torch.randn(400, 2, generator=generator)))[:, None]
    negative = (scale * (-1.0 + torch.randn(400, 2, generator=generator)))[:, None]
    normal = METHODS["logistic_probe"](positive, negative, 0)[0]
    assert float(normal[1] / normal[0]) == pytest.approx(0.01, rel=0.3)
