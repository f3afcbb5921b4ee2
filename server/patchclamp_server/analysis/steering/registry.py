"""The extraction methods have the names of the enum ExtractionMethod, in lower case without its prefix.

Those of METHODS find a direction from the pooled activations of two sides of examples. The others (OTHER_METHODS) are
jobs of their own: what they are given is no pair of sides, or they are trained. INPUTS says of all what they are given.
"""

from collections.abc import Mapping
from typing import Protocol

import torch

from patchclamp_server.analysis.steering import (
    difference_of_means,
    linear_artificial_tomography,
    linear_discriminant,
    logistic_probe,
    mean_centred,
    pca_of_differences,
)


class Method(Protocol):
    """Finds directions from activations of two sides.

    positive [n, layers, d] and negative [m, layers, d] are float32 on the CPU; with pairs row i of both is from pair i.
    The result is [layers, d]. Layers are independent of each other. Positives project higher, and the length is
    ‖mean(h⁺) - mean(h⁻)‖ (zero when no direction can be found), so that a strength means the same for every method.
    """

    def __call__(self, positive: torch.Tensor, negative: torch.Tensor, seed: int) -> torch.Tensor: ...


METHODS: Mapping[str, Method] = {
    "difference_of_means": difference_of_means.directions,
    "pca_of_differences": pca_of_differences.directions,
    "logistic_probe": logistic_probe.directions,
    "linear_discriminant": linear_discriminant.directions,
    "linear_artificial_tomography": linear_artificial_tomography.directions,
    "mean_centred": mean_centred.directions,
}
OTHER_METHODS = ("task_vector", "causal_inner_product", "definition", "reft_r1")
# Alternatives, each of the fields of ExtractVectorsRequest that have to be given together.
INPUTS: Mapping[str, tuple[tuple[str, ...], ...]] = {
    "difference_of_means": (("pairs",), ("texts",)),
    "pca_of_differences": (("pairs",),),
    "logistic_probe": (("pairs",), ("texts",)),
    "linear_discriminant": (("pairs",), ("texts",)),
    "linear_artificial_tomography": (("pairs",), ("texts",)),
    "mean_centred": (("texts",),),
    "task_vector": (("demonstrations",),),
    "causal_inner_product": (("word_pairs",),),
    "definition": (("demonstrations", "definition"),),
    "reft_r1": (("pairs",), ("texts",)),
}
