"""Every extraction method finds a direction that was planted in synthetic activations, and equals its formula."""

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from sklearn.decomposition import PCA

from patchclamp_server.analysis.steering.registry import METHODS

PAIRS, LAYERS, WIDTH = 400, 3, 24
DISTANCE = 3.0
# It does not look at the labels, and pairs examples that differ in their topics: it needs many.
UNSUPERVISED = "linear_artificial_tomography"


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
    assert torch.cosine_similarity(few, direction, dim=-1).min() > (0.0 if name == UNSUPERVISED else 0.5)


@pytest.mark.parametrize("name", sorted(set(METHODS) - {"pca_of_differences"}))
def test_sides_of_different_sizes_do_where_nothing_is_paired(name: str) -> None:
    positive, negative, direction = planted()
    found = METHODS[name](positive, negative[:200], 0)
    assert torch.cosine_similarity(found, direction, dim=-1).min() > 0.9


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


def _ledoit_wolf(x: NDArray[np.float64]) -> NDArray[np.float64]:
    """(1 - s) C + s tr(C)/d I of x [n, d], as Ledoit and Wolf 2004 write it in §3.3."""
    n, d = x.shape
    x = x - x.mean(0)
    covariance = x.T @ x / n
    target = np.trace(covariance) / d * np.eye(d)
    distance = np.square(covariance - target).sum()
    spread = sum(np.square(np.outer(row, row) - covariance).sum() for row in x) / n**2
    share = min(spread, distance) / distance
    return np.asarray((1 - share) * covariance + share * target)


def test_the_linear_discriminant_is_that_of_the_shrunken_covariances_within_the_sides() -> None:
    positive, negative, _ = planted()
    positive, negative = positive[:90], negative[:30]
    # A loud coordinate.
    positive[..., 3] *= 40
    found = METHODS["linear_discriminant"](positive, negative, 0)
    for layer in range(LAYERS):
        sides = [side[:, layer].double().numpy() for side in (positive, negative)]
        within = 0
        for share, side in zip((0.75, 0.25), sides, strict=True):
            scale = side.std(0)
            within = within + share * _ledoit_wolf(side / scale) * np.outer(scale, scale)
        difference = sides[0].mean(0) - sides[1].mean(0)
        expected = np.linalg.solve(within, difference)
        expected *= np.linalg.norm(difference) / np.linalg.norm(expected)
        np.testing.assert_allclose(found[layer].numpy(), expected, rtol=1e-4, atol=1e-5)


def test_the_linear_discriminant_of_sides_that_do_not_vary_is_the_difference_of_means() -> None:
    positive, negative = torch.tensor([[1.0, 5.0]]).expand(4, 1, 2), torch.tensor([[0.0, 2.0]]).expand(4, 1, 2)
    torch.testing.assert_close(METHODS["linear_discriminant"](positive, negative, 0), torch.tensor([[1.0, 3.0]]))


def test_the_discriminant_discounts_a_direction_that_varies_within_a_side() -> None:
    generator = torch.Generator().manual_seed(0)
    scale, shift = torch.tensor([0.3, 6.0]), torch.tensor([1.0, 1.0])
    positive = (shift + scale * torch.randn(300, 2, generator=generator))[:, None]
    negative = (-shift + scale * torch.randn(300, 2, generator=generator))[:, None]
    found = METHODS["linear_discriminant"](positive, negative, 0)[0]
    assert abs(float(found[1] / found[0])) < 0.1


def test_artificial_tomography_is_the_principal_component_of_random_normalised_differences() -> None:
    positive, negative, _ = planted()
    positive = positive[:41]
    found = METHODS[UNSUPERVISED](positive, negative[:60], 7)
    order = torch.randperm(101, generator=torch.Generator().manual_seed(7)).numpy()[:100]
    for layer in range(LAYERS):
        examples = np.concatenate([positive[:, layer].numpy(), negative[:60, layer].numpy()]).astype(np.float64)
        pairs = examples[order[0::2]] - examples[order[1::2]]
        pairs /= np.linalg.norm(pairs, axis=1, keepdims=True)
        component = PCA(1).fit(pairs).components_[0]
        cosine = float(torch.cosine_similarity(found[layer], torch.from_numpy(component).float(), dim=0))
        assert abs(cosine) > 1 - 1e-5


def test_artificial_tomography_finds_what_varies_most_whatever_the_labels_say() -> None:
    generator = torch.Generator().manual_seed(0)
    scale, shift = torch.tensor([0.3, 6.0]), torch.tensor([1.0, 0.5])
    positive = (shift + scale * torch.randn(300, 2, generator=generator))[:, None]
    negative = (-shift + scale * torch.randn(300, 2, generator=generator))[:, None]
    found = METHODS[UNSUPERVISED](positive, negative, 0)[0]
    assert abs(float(found[0] / found[1])) < 0.1


def test_mean_centring_takes_the_mean_of_ordinary_text_away() -> None:
    target, ordinary, _ = planted()
    found = METHODS["mean_centred"](target[:7], ordinary, 0)
    np.testing.assert_allclose(found.numpy(), target[:7].numpy().mean(0) - ordinary.numpy().mean(0), atol=1e-5)
