"""Random neuron sets that a set is compared with: as many neurons in each layer, none of them of the set itself."""

from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

from patchclamp_server.artifacts.neuron_sets import Neuron, NeuronSet
from patchclamp_server.errors import InvalidArgument


def random_sets(
    found: NeuronSet, d_ff: int, n: int, seed: int, path: str = "random_sets"
) -> tuple[tuple[Neuron, ...], ...]:
    """Returns `n` sets, each drawn uniformly without replacement from the other neurons of every layer.

    The i-th neuron of each set is in the layer of the i-th neuron of `found`, so that the first k of both are
    matched by layer too. Raises InvalidArgument where a layer has fewer other neurons than the set has in it.
    """
    drawn = np.empty((n, len(found.neurons)), dtype=np.int64)
    places = found.by_layer()
    for layer, row, neurons in draws(found, d_ff, n, seed, path):
        drawn[row, places[layer].numpy()] = neurons
    layers = [neuron.layer for neuron in found.neurons]
    return tuple(tuple(map(Neuron, layers, row)) for row in drawn.tolist())


def draws(
    found: NeuronSet, d_ff: int, n: int, seed: int, path: str = "random_sets"
) -> Iterator[tuple[int, int, NDArray[np.int64]]]:
    """Yields layer, number of the set, and the neurons that the set has in the layer: the sets of random_sets() a part
    at a time, for whoever needs no more of them than a sum."""
    generator = np.random.default_rng(seed)
    for layer, places in found.by_layer().items() if n else ():
        own = [found.neurons[place].neuron for place in places.tolist()]
        others = np.setdiff1d(np.arange(d_ff), own)
        if len(own) > len(others):
            message = f"layer {layer} has {len(others)} neurons beside the {len(own)} of the set; expected no more"
            raise InvalidArgument(path, message)
        for row in range(n):
            yield layer, row, generator.choice(others, len(own), replace=False)
