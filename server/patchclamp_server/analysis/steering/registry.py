"""The extraction methods have the names of the enum ExtractionMethod, in lower case without its prefix."""

from collections.abc import Mapping
from typing import Protocol

import torch

from patchclamp_server.analysis.steering import difference_of_means, logistic_probe, pca_of_differences


class Method(Protocol):
    """Finds directions from paired activations.

    positive, negative [n, layers, d] are float32 on the CPU, row i of both from pair i; the result is [layers, d].
    Layers are independent of each other. Positives project higher, and the length is ‖mean(h⁺) - mean(h⁻)‖ (zero when
    no direction can be found), so that a strength means the same for every method.
    """

    def __call__(self, positive: torch.Tensor, negative: torch.Tensor, seed: int) -> torch.Tensor: ...


METHODS: Mapping[str, Method] = {
    "difference_of_means": difference_of_means.directions,
    "pca_of_differences": pca_of_differences.directions,
    "logistic_probe": logistic_probe.directions,
}
