"""Neurons that write in favour of words, or along a direction of the residual stream: found by their down columns.

    words     z_j = mean over the words' tokens t of (p_t - mean p) / deviation p,   p_t = (g_out * down_j) · (g * u_t)
    vector    c_j = cos(g_out * down_j, v)
    score     |z_j| or |c_j|;   value: sign of z_j or c_j times the size that was asked for

(symbols: weights.py). The sign is that of the activation which makes the words likelier, or moves the residual stream
along the vector: clamped to its value, a neuron does so. Words are scored by their first token. The control is the same
best score for random tokens of the vocabulary, or for random directions: what stands out for no reason. No text is run.

Source: Davies 2025, Decoding specialised feature neurons in LLMs with the final projection layer.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from patchclamp_server.analysis.neurons.decode import DecodedToken
from patchclamp_server.analysis.neurons.stored import best_of
from patchclamp_server.analysis.neurons.weights import NeuronWeights, Vocabulary, neuron_directions
from patchclamp_server.analysis.progress import Progress, Steps
from patchclamp_server.artifacts.neuron_sets import Neuron, NeuronSet
from patchclamp_server.artifacts.types import NO_TAGS, Tags
from patchclamp_server.engine.exclusive import Slice, Work
from patchclamp_server.model.decoder import Decoder

# Random tokens or directions that the best neuron of each is found for.
CONTROLS = 100


@dataclass(frozen=True, eq=False)
class Finding:
    """What is sought: first `tokens` of words, or a `vector` [d_model], or one for each layer [layers, d_model]."""

    layers: tuple[int, ...]
    tokens: tuple[int, ...] = ()
    words: tuple[str, ...] = ()
    vector: Tensor | None = None
    top_k: int = 20
    value: float = 20.0
    description: str = ""
    tags: Tags = NO_TAGS


@dataclass(frozen=True, eq=False)
class Found:
    """`effects` float32 [layers, d_ff]: z or cosine. `controls` [CONTROLS]: the best score of each control.

    `tokens`: those that stand for the words, with p of the down column of the best neuron.
    """

    neurons: NeuronSet
    effects: Tensor
    controls: Tensor
    tokens: tuple[DecodedToken, ...] = ()

    def evidence(self) -> dict[str, Any]:
        """Returns what is stored beside the set."""
        assert self.neurons.scores is not None
        best = float(self.neurons.scores[0])
        return {
            "best": best,
            "random_best": {"mean": float(self.controls.mean()), "max": float(self.controls.max()), "n": CONTROLS},
            "share_of_random_that_reach_the_best": float((self.controls >= best).float().mean()),
        }


def find(decoder: Decoder, job: Finding) -> Work[Progress | Found]:
    """A work at the exclusive door: yields progress in layers, then what was found."""
    yield Slice(1)
    vocabulary = Vocabulary.of(decoder) if job.vector is None else None
    effect, controls = _by_words(vocabulary, job) if vocabulary is not None else _along(decoder, job)
    steps, found = Steps("layers", len(job.layers)), []
    highest = torch.zeros(CONTROLS)
    for row, layer in enumerate(job.layers):
        yield Slice(1)
        down = neuron_directions(decoder.blocks[layer], decoder.spec)[NeuronWeights.DOWN]
        found.append(effect(down, row))
        highest = torch.maximum(highest, controls(down).abs().amax(0).cpu())
        yield steps.advance()
    effects = torch.stack(found).cpu()
    values = effects.sign() * abs(job.value)
    best = best_of(effects.abs(), job.layers, job.top_k, values)
    tokens = () if vocabulary is None else _of_best(best.neurons[0], decoder, vocabulary, job.tokens)
    yield Found(best, effects, highest, tokens)


def _of_best(
    best: Neuron, decoder: Decoder, vocabulary: Vocabulary, tokens: tuple[int, ...]
) -> tuple[DecodedToken, ...]:
    down = neuron_directions(decoder.blocks[best.layer], decoder.spec)[NeuronWeights.DOWN][best.neuron]
    products = vocabulary.products_of(down[None], torch.tensor(tokens))[0].tolist()
    return tuple(map(DecodedToken, tokens, products, products))


def _by_words(
    vocabulary: Vocabulary, job: Finding
) -> tuple[Callable[[Tensor, int], Tensor], Callable[[Tensor], Tensor]]:
    """Returns z [d_ff] of the words for down columns [d_ff, d_model], and z [d_ff, CONTROLS] of random tokens."""
    random = torch.randint(len(vocabulary.rows), (CONTROLS,), generator=torch.Generator().manual_seed(0))

    def z(down: Tensor, tokens: Tensor) -> Tensor:
        mean, deviation = vocabulary.spread(down)
        products = vocabulary.products_of(down, tokens)
        return (products - mean[:, None]) / deviation.clamp(min=torch.finfo(torch.float32).tiny)[:, None]

    sought = torch.tensor(job.tokens)
    return lambda down, row: z(down, sought).mean(1), lambda down: z(down, random)


def _along(decoder: Decoder, job: Finding) -> tuple[Callable[[Tensor, int], Tensor], Callable[[Tensor], Tensor]]:
    """Returns the cosines [d_ff] with the vector, and [d_ff, CONTROLS] with random directions."""
    assert job.vector is not None
    rows = job.vector.float().expand(len(job.layers), -1)
    random = torch.randn(CONTROLS, decoder.spec.d_model, generator=torch.Generator().manual_seed(0))

    def cosine(down: Tensor, directions: Tensor) -> Tensor:
        unit = torch.nn.functional.normalize(down, dim=1)
        return unit @ torch.nn.functional.normalize(directions.to(down.device), dim=-1).T

    return lambda down, row: cosine(down, rows[row : row + 1])[:, 0], lambda down: cosine(down, random)
