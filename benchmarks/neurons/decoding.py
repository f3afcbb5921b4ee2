"""Decoding: the seconds that DecodeNeurons takes for all neurons, as a client sees them.

The time of an 8B shape is extrapolated and was not measured: the time of the products grows with
rows · vocabulary · width, and that of what is sent with rows. Both rates are taken as one, that of the products, which
overstates the second.
"""

import time
from typing import Any

from neurons.shown import say
from patchclamp import Client
from patchclamp.results import Progress

# Layers, neurons of a layer, width and vocabulary of Llama 3.1 8B.
LARGE = {"n_layers": 32, "d_ff": 14336, "d_model": 4096, "vocab_size": 128256}


def measure(client: Client, layers: int) -> dict[str, Any]:
    """Seconds of the first so many layers."""
    model = client.models()[0]
    layers = min(layers, model.n_layers)
    started = time.perf_counter()
    neurons = 0
    for event in client.decode_neurons(layers=range(layers), tokens=10):
        if isinstance(event, Progress):
            continue
        before, neurons = neurons, neurons + len(event.neurons)
        if neurons // model.d_ff > before // model.d_ff:
            say(f"decoded {neurons} neurons in {time.perf_counter() - started:.1f} s")
    seconds = time.perf_counter() - started
    products = model.d_ff * model.d_model * model.vocab_size
    large = LARGE["d_ff"] * LARGE["d_model"] * LARGE["vocab_size"]
    return {
        "neurons": neurons,
        "layers": layers,
        "seconds": seconds,
        "neurons_per_second": neurons / seconds,
        "extrapolated_8b_seconds": seconds / layers * LARGE["n_layers"] * large / products,
        "extrapolated_8b_shape": LARGE,
    }
