"""Neurons read by their weights: the tokens whose unembedding has the largest and smallest products with each row.

    p_t = w · (g * u_t)      top: the k largest, bottom: the k smallest;  z of the first: (p - mean p) / deviation of p

for w the direction that a neuron's gate or up row reads, or that its down column writes (weights.py). A row of gate or
up says what opens a neuron; whether the neuron then makes a token likelier is told by the sign of p of its down column,
the `effect` of every token. Without it the sign is a guess: in METHODS N7 four words became less likely by the sign of
up. No text is run.

Source: Davies 2025, Decoding specialised feature neurons in LLMs with the final projection layer.
"""

from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from patchclamp_server.analysis.neurons.weights import NeuronWeights, Vocabulary, neuron_directions
from patchclamp_server.analysis.progress import Progress, Steps
from patchclamp_server.artifacts.neuron_sets import Neuron
from patchclamp_server.cpu.row_extremes import row_extremes
from patchclamp_server.engine.exclusive import Slice, Work
from patchclamp_server.model.decoder import Decoder

# Products with the whole vocabulary that are kept at a time, as bytes of float32.
MAX_PRODUCT_BYTES = 64 * 1024 * 1024
# Neurons of the smallest part: a product reads the whole unembedding, however few rows it has, and takes hardly longer
# for these than for one.
SMALLEST_PART = 32
# Neurons that come in one event: a message of it with 100 tokens a side stays below a megabyte.
NEURONS_AN_EVENT = 32


@dataclass(frozen=True)
class Decoding:
    """What is decoded. `neurons`: those, or none for all neurons of `layers`. `top_k`: tokens of each row and side."""

    layers: tuple[int, ...]
    weights: tuple[NeuronWeights, ...]
    neurons: tuple[Neuron, ...] = ()
    top_k: int = 10


@dataclass(frozen=True)
class DecodedToken:
    """`product`: p of the row; `effect`: p of the down column of the neuron."""

    id: int
    product: float
    effect: float


@dataclass(frozen=True)
class DecodedRow:
    weights: NeuronWeights
    top: tuple[DecodedToken, ...]
    bottom: tuple[DecodedToken, ...]
    top_z: float
    bottom_z: float


@dataclass(frozen=True)
class DecodedNeuron:
    neuron: Neuron
    rows: tuple[DecodedRow, ...]


def decode(decoder: Decoder, job: Decoding) -> Work[Progress | list[DecodedNeuron]]:
    """A work at the exclusive door: yields decoded neurons, by layer, each in the order listed, and progress."""
    wanted = _by_layer(job, decoder.spec.d_ff)
    steps = Steps("neurons", sum(len(indices) for _, indices in wanted))
    # What the vocabulary takes says nothing of the neurons: it counts as many.
    yield Slice(SMALLEST_PART)
    vocabulary = Vocabulary.of(decoder)
    most = max(1, MAX_PRODUCT_BYTES // (4 * len(vocabulary.rows) * len(job.weights)))
    k = min(job.top_k, len(vocabulary.rows))
    largest = min(most, max(map(len, (indices for _, indices in wanted)), default=0))
    into = vocabulary.rows.new_empty(largest * len(job.weights), len(vocabulary.rows))
    for layer, indices in wanted:
        directions = neuron_directions(decoder.blocks[layer], decoder.spec)
        done = 0
        while done < len(indices):
            # A row of a slice is a neuron, with all its matrices.
            granted = yield Slice(min(most, len(indices) - done))
            part = indices[done : done + min(max(granted, SMALLEST_PART), most)]
            done += len(part)
            found = _decoded(vocabulary, directions, layer, part, job.weights, k, into)
            for start in range(0, len(found), NEURONS_AN_EVENT):
                yield found[start : start + NEURONS_AN_EVENT]
            yield steps.advance(len(part))


def _decoded(
    vocabulary: Vocabulary,
    directions: dict[NeuronWeights, Tensor],
    layer: int,
    indices: Sequence[int],
    weights: Sequence[NeuronWeights],
    k: int,
    into: Tensor,
) -> list[DecodedNeuron]:
    chosen = torch.tensor(indices, device=vocabulary.rows.device)
    # All matrices in one product, which reads the unembedding once: [matrices x neurons, d_model].
    w = torch.cat([directions[matrix][chosen] for matrix in weights])
    down = directions[NeuronWeights.DOWN][chosen].repeat(len(weights), 1)
    top, top_ids, bottom, bottom_ids = row_extremes(vocabulary.products(w, into), k)
    mean, deviation = vocabulary.spread(w)
    # A neuron whose weights are 0 stands out nowhere.
    deviation = deviation.clamp(min=torch.finfo(torch.float32).tiny)
    sides = [
        (
            values.tolist(),
            ids.tolist(),
            vocabulary.products_at(down, ids).tolist(),
            ((values[:, 0] - mean) / deviation).tolist(),
        )
        for values, ids in ((top, top_ids), (bottom, bottom_ids))
    ]

    def row(place: int, matrix: NeuronWeights) -> DecodedRow:
        tokens = [
            tuple(map(DecodedToken, ids[place], values[place], effects[place])) for values, ids, effects, _ in sides
        ]
        return DecodedRow(matrix, tokens[0], tokens[1], sides[0][3][place], sides[1][3][place])

    return [
        DecodedNeuron(
            Neuron(layer, index), tuple(row(j * len(indices) + i, matrix) for j, matrix in enumerate(weights))
        )
        for i, index in enumerate(indices)
    ]


def _by_layer(job: Decoding, d_ff: int) -> list[tuple[int, Sequence[int]]]:
    if not job.neurons:
        return [(layer, range(d_ff)) for layer in job.layers]
    return list(_runs(job.neurons))


def _runs(neurons: Sequence[Neuron]) -> Iterator[tuple[int, list[int]]]:
    """Yields the neurons of each layer, layers in the order in which they come first: weights are unfolded once."""
    by_layer: defaultdict[int, list[int]] = defaultdict(list)
    for neuron in neurons:
        by_layer[neuron.layer].append(neuron.neuron)
    yield from by_layer.items()
