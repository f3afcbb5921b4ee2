"""PCA of differences: the first principal component of d_i = h⁺_i - h⁻_i, the unit u that maximises Σ (d_i · u)².

The differences are not centred. LAT (Zou et al. 2023, Representation Engineering, §3.1) centres differences that were
taken in a random order within each pair, so that their mean vanishes in expectation; the second moment about zero is
the limit of that over all orders. Centring differences of a fixed order would remove the shared direction itself.

Sign: the positives project higher on average. Length: ‖mean(d)‖, the one of `difference_of_means`, so that a
strength means the same for every method.
"""

import torch


def directions(positive: torch.Tensor, negative: torch.Tensor, seed: int) -> torch.Tensor:
    """Returns directions [layers, d] of positive, negative [n, layers, d]. Nothing is random; `seed` is not used."""
    differences = (positive - negative).double().unbind(dim=1)
    return torch.stack([_scaled_first_component(layer) for layer in differences]).to(positive.dtype)


def _scaled_first_component(differences: torch.Tensor) -> torch.Tensor:
    """Returns the scaled component [d] of differences [n, d]."""
    n, width = differences.shape
    # The smaller of the two Gram matrices has the same largest eigenvalue.
    if n < width:
        weights = torch.linalg.eigh(differences @ differences.T).eigenvectors[:, -1]
        component = differences.T @ weights
    else:
        component = torch.linalg.eigh(differences.T @ differences).eigenvectors[:, -1]
    mean = differences.mean(dim=0)
    if component @ mean < 0:
        component = -component
    # Where all differences are zero, the component is zero, and so is the result.
    scaled: torch.Tensor = torch.nn.functional.normalize(component, dim=0) * mean.norm()
    return scaled
