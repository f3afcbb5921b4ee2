"""The methods that find effects of heads have the names of the enum CircuitMethod, in lower case without its prefix."""

from collections.abc import Iterator, Mapping
from typing import Protocol

from torch import Tensor

from patchclamp_server.analysis.heads.circuits import activation_patching, mean_ablation, path_patching
from patchclamp_server.analysis.heads.circuits.runs import PairRuns
from patchclamp_server.engine.exclusive import Sliced
from patchclamp_server.model.decoder import Decoder


class CircuitMethod(Protocol):
    """Finds what an intervention on one head changes of the metric of a pair.

    `means` [n_layers, T or 1, n_heads, head_dim] has the mean output of every head over the corrupt prompts of all
    pairs. Yields parts of a work, each of which returns float64 [n], the changes of the next n heads, ordered by layer
    and head, until all have been given.
    """

    def __call__(self, decoder: Decoder, runs: PairRuns, means: Tensor) -> Iterator[Sliced[Tensor]]: ...


CIRCUIT_METHODS: Mapping[str, CircuitMethod] = {
    "mean_ablation": mean_ablation.changes,
    "activation_patching": activation_patching.changes,
    "path_patching": path_patching.changes,
}
