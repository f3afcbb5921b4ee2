"""Random neuron sets that a set is compared with: as many neurons in each layer, none of them of the set itself."""

import numpy as np

from patchclamp_server.artifacts.neuron_sets import Neuron, NeuronSet
from patchclamp_server.errors import InvalidArgument


def random_sets(
    found: NeuronSet, d_ff: int, n: int, seed: int, path: str = "random_sets"
) -> tuple[tuple[Neuron, ...], ...]:
    """Returns `n` sets, each drawn uniformly without replacement from the other neurons of every layer.

    The i-th neuron of each set is in the layer of the i-th neuron of `found`, so that the first k of both are
    matched by layer too. Raises InvalidArgument where a layer has fewer other neurons than the set has in it.
    """
    generator = np.random.default_rng(seed)
    drawn = np.empty((n, len(found.neurons)), dtype=np.int64)
    if n:
        for layer, places in found.by_layer().items():
            own = [found.neurons[place].neuron for place in places.tolist()]
            others = np.setdiff1d(np.arange(d_ff), own)
            if len(own) > len(others):
                message = f"layer {layer} has {len(others)} neurons beside the {len(own)} of the set; expected no more"
                raise InvalidArgument(path, message)
            for row in drawn:
                row[places.numpy()] = generator.choice(others, len(own), replace=False)
    layers = [neuron.layer for neuron in found.neurons]
    return tuple(tuple(map(Neuron, layers, row)) for row in drawn.tolist())
