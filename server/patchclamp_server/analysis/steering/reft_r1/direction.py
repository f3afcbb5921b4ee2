"""ReFT-r1: one direction, trained to detect a concept and to write it.

    w = u / ‖u‖                        u [width] is trained, by Adam, from the difference of means of length 1
    a_t = max(h_t · w, 0)              detects: latent of token t
    s = mean of the TOP_K largest a_t  of a text
    h'_t = h_t + s w                   writes
    loss = mean over positives of  -log p(text | h') per token
         + SPARSITY / m · (mean over positives of the mean of all a_t but the TOP_K largest
                         + mean over negatives of the mean of all a_t)

t are the ordinary tokens of a text: attention sinks are no part of it (interventions/pooling.py). m is the mean ‖h_t‖
of the texts that are trained on, so that SPARSITY means the same at every layer and for every model.

Nothing before the layer depends on w: states there are computed once, and each pass begins at the layer. Of negatives
nothing else is run. Source: Wu et al. 2025, AxBench: Steering LLMs? Even Simple Baselines Outperform Sparse
Autoencoders, §3 (ReFT-r1). Their training also has the model predict negatives, with s w added to these as well; here
a negative has no latent that may be large, which is what tells it from a positive.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from patchclamp_server.analysis.neurons.backward import activations_at, differentiated
from patchclamp_server.analysis.neurons.batches import batches
from patchclamp_server.analysis.neurons.products import DifferentiableModel
from patchclamp_server.analysis.neurons.targets import Example, LogitDifference
from patchclamp_server.analysis.progress import Progress
from patchclamp_server.analysis.steering.reft_r1.texts import Tokens, log_probability
from patchclamp_server.analysis.subspaces.interchange import intervened
from patchclamp_server.analysis.training import Trained, Training, batch_order, train
from patchclamp_server.engine.exclusive import Slice, Sliced, Telling
from patchclamp_server.interventions.pooling import ordinary_tokens
from patchclamp_server.model.sites import Site

TOP_K = 8
SPARSITY = 5.0


@dataclass(frozen=True, eq=False)
class KeptText:
    """A text that ran up to a layer: `before` [tokens, d_model], the residual stream before the layer; `states`
    [tokens, width] at the site; `ordinary` [n], rows of these. float32, on the model's device."""

    tokens: Tokens
    before: Tensor
    states: Tensor
    ordinary: Tensor

    @property
    def exchanged(self) -> Tensor:
        """Rows that are edited: the last token is predicted, and does not run."""
        return self.ordinary[self.ordinary < len(self.tokens) - 1]

    @property
    def read(self) -> Tensor:
        """States [n, width] of the ordinary tokens."""
        return self.states[self.ordinary]


@dataclass(frozen=True, eq=False)
class Sides:
    """Texts at one layer: the positives, and of the negatives the states [n, width] of their ordinary tokens."""

    positive: list[KeptText]
    negative: list[Tensor]


@dataclass(frozen=True)
class Place:
    layer: int
    site: Site


def kept_texts(model: DifferentiableModel, texts: Sequence[Tokens], at: Place) -> Sliced[list[KeptText]]:
    """Returns the texts in their order; each token runs once, up to the site."""
    found: dict[int, KeptText] = {}
    # A text runs up to the site alone: it has no target.
    for batch in batches([Example(text, LogitDifference(0)) for text in texts], model.decoder.spec):
        before, states = yield from activations_at(model, batch, at.layer, at.site)
        for number, span in zip(batch.numbers, batch.spans, strict=True):
            rows = ordinary_tokens(states[span]).nonzero()[:, 0]
            found[number] = KeptText(texts[number], before[span].clone(), states[span].clone(), rows)
    return [found[number] for number in range(len(texts))]


def kept_states(model: DifferentiableModel, texts: Sequence[Tokens], at: Place) -> Sliced[list[Tensor]]:
    """Returns the states [n, width] of the ordinary tokens of each text."""
    found: dict[int, Tensor] = {}
    for batch in batches([Example(text, LogitDifference(0)) for text in texts], model.decoder.spec):
        _, states = yield from activations_at(model, batch, at.layer, at.site)
        for number, span in zip(batch.numbers, batch.spans, strict=True):
            found[number] = states[span][ordinary_tokens(states[span])]
    return [found[number] for number in range(len(texts))]


def difference_of_means(sides: Sides) -> Tensor:
    """Returns the difference [width] of the means over texts of their mean states."""
    positive = torch.stack([text.read.mean(0) for text in sides.positive])
    return positive.mean(0) - torch.stack([states.mean(0) for states in sides.negative]).mean(0)


def latents(states: Tensor, unit: Tensor) -> Tensor:
    """Returns a [n] of states [n, width]."""
    return torch.relu(states @ unit)


def strength(found: Tensor) -> Tensor:
    """Returns s of the latents [n] of a text."""
    return found.topk(min(TOP_K, len(found))).values.mean()


def others(found: Tensor) -> Tensor:
    """Returns the mean over the latents [n] of a text, those of the TOP_K largest as 0."""
    return (found.sum() - found.topk(min(TOP_K, len(found))).values.sum()) / len(found)


def mean_strength(sides: Sides, unit: Tensor) -> float:
    """Returns the mean s of the positives."""
    return float(torch.stack(_strengths(sides, unit)).mean())


def mean_norm(sides: Sides) -> float:
    """Returns m."""
    norms = torch.cat([*(text.read for text in sides.positive), *sides.negative]).norm(dim=1)
    return float(norms.mean())


def train_direction(
    model: DifferentiableModel, sides: Sides, heldout: Sides, at: Place, training: Training, seed: int
) -> Telling[Progress, Trained[Tensor]]:
    """A work at the exclusive door, which tells its steps: passes of a batch are sliced by blocks (backward.py), and a
    step of Adam is a slice. Returns w [width]. The seed is that of the order of the texts."""
    numbers, optimizer = _begin(difference_of_means(sides), training)
    weight = SPARSITY / mean_norm(sides)
    positive, negative = sides.positive, sides.negative

    def evaluate() -> Sliced[tuple[Tensor, float]]:
        unit = _unit(numbers)
        losses = yield from text_losses(model, heldout.positive, [own * unit for own in _strengths(heldout, unit)], at)
        return unit, sum(losses) / len(losses) + weight * float(_penalty(heldout, unit))

    def step(number: int) -> Sliced[float]:
        own = [positive[i] for i in batch_order(len(positive), training.batch_size, seed, number)]
        beside = [negative[i] for i in batch_order(len(negative), training.batch_size, seed + 1, number)]
        return (yield from _train(model, Sides(own, beside), numbers, optimizer, weight, at))

    return (yield from train(training, len(positive), f"training of layer {at.layer}", evaluate, step))


def text_losses(
    model: DifferentiableModel, texts: Sequence[KeptText], added: Sequence[Tensor], at: Place
) -> Sliced[list[float]]:
    """Returns -log p of each text per token, with `added` [width] at its ordinary tokens."""
    states = [text.states[text.exchanged] + own for text, own in zip(texts, added, strict=True)]
    examples = [log_probability(text.tokens) for text in texts]
    outcome = yield from intervened(model, texts, states, examples, at.layer, at.site, gradients=False)
    return [-value / (len(text.tokens) - 1) for value, text in zip(outcome.values, texts, strict=True)]


def _train(
    model: DifferentiableModel,
    sides: Sides,
    numbers: Tensor,
    optimizer: torch.optim.Optimizer,
    weight: float,
    at: Place,
) -> Sliced[float]:
    """One step of Adam. Returns the loss before it."""
    unit, texts = _unit(numbers), sides.positive
    states = [t.states[t.exchanged] + s * unit for t, s in zip(texts, _strengths(sides, unit), strict=True)]
    examples = [log_probability(text.tokens) for text in texts]
    outcome = yield from intervened(model, texts, states, examples, at.layer, at.site, gradients=True)
    yield Slice(1)
    penalty = _step(sides, outcome.gradients, numbers, optimizer, weight)
    losses = [-value / (len(text.tokens) - 1) for value, text in zip(outcome.values, texts, strict=True)]
    return float(np.mean(losses)) + penalty


def _strengths(sides: Sides, unit: Tensor) -> list[Tensor]:
    return [strength(latents(text.read, unit)) for text in sides.positive]


def _penalty(sides: Sides, unit: Tensor) -> Tensor:
    positive = torch.stack([others(latents(text.read, unit)) for text in sides.positive])
    negative = torch.stack([latents(states, unit).mean() for states in sides.negative])
    return positive.mean() + negative.mean()


# Works at the exclusive door run in inference mode, whose tensors take no part in a backward pass.
@differentiated
def _begin(direction: Tensor, training: Training) -> tuple[Tensor, torch.optim.Optimizer]:
    numbers = torch.nn.functional.normalize(direction.clone(), dim=0).requires_grad_()
    return numbers, torch.optim.Adam([numbers], lr=training.learning_rate)


@differentiated
def _unit(numbers: Tensor) -> Tensor:
    return torch.nn.functional.normalize(numbers.detach(), dim=0)


@differentiated
def _step(
    sides: Sides, gradients: Sequence[Tensor], numbers: Tensor, optimizer: torch.optim.Optimizer, weight: float
) -> float:
    """∂loss/∂u through h' = h + s w, from ∂F/∂h' at the edited tokens. Returns the weighted penalty before the step."""
    unit = torch.nn.functional.normalize(numbers, dim=0)
    through = []
    for text, of_states in zip(sides.positive, gradients, strict=True):
        written = strength(latents(text.read, unit)) * unit
        through.append(-(of_states.sum(0) @ written) / (len(text.tokens) - 1))
    # What inference mode has made takes no part in a backward pass, but its copies do.
    sides = Sides(sides.positive, [states.clone() for states in sides.negative])
    penalty = weight * _penalty(sides, unit)
    optimizer.zero_grad()
    (torch.stack(through).mean() + penalty).backward()  # type: ignore[no-untyped-call]
    optimizer.step()
    return float(penalty.detach())
