"""Evidence of ReFT-r1 at a layer, on held-out texts, beside the difference of means and random directions.

    score of a text = max_t h_t · v / ‖v‖      over its ordinary tokens, as it is detected
    loss            = mean over positives of -log p(text | h_t + v) per token, as `add` writes it at strength 1

Accuracy is the share of texts on the right side of the midpoint of the mean scores of both sides that were trained on;
AUROC needs no threshold. The difference of means is that of the mean states of the texts that were trained on, with a
length of its own. Random directions are as long as the vector, and turned so that positives score higher.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from patchclamp_server.analysis.neurons.products import DifferentiableModel
from patchclamp_server.analysis.steering.detection.ranking import auroc
from patchclamp_server.analysis.steering.evidence import RANDOM_DIRECTIONS, LayerEvidence, TrainingEvidence
from patchclamp_server.analysis.steering.reft_r1.direction import (
    Place,
    Sides,
    difference_of_means,
    text_losses,
)
from patchclamp_server.analysis.steering.token_projections import TokenProjections
from patchclamp_server.engine.exclusive import Sliced

# Of which the loss is measured, a pass over the held-out positives each.
RANDOM_LOSSES = 3

Floats = NDArray[np.float64]


@dataclass(frozen=True, eq=False)
class Scores:
    """Of both sides [texts, k], for k directions."""

    positive: Tensor
    negative: Tensor

    @property
    def midpoint(self) -> Tensor:
        """[k]."""
        return (self.positive.mean(0) + self.negative.mean(0)) / 2

    def accuracy(self, midpoint: Tensor) -> Tensor:
        """[k], the mean over both sides."""
        above = (self.positive > midpoint).double().mean(0)
        return (above + (self.negative < midpoint).double().mean(0)) / 2

    def auroc(self) -> list[float]:
        """Of each direction."""
        is_target = np.repeat([True, False], [len(self.positive), len(self.negative)])
        both = torch.cat([self.positive, self.negative]).double().cpu().numpy()
        return [auroc(column, is_target) for column in both.T]

    def margin(self) -> float:
        """Distance of the sides of the first direction in standard deviations within them; 0 where nothing varies."""
        positive, negative = self.positive[:, 0].double(), self.negative[:, 0].double()
        variance = (positive.var(correction=0) + negative.var(correction=0)) / 2
        return float((positive.mean() - negative.mean()) / variance.sqrt()) if variance > 0 else 0.0


def scores(sides: Sides, units: Tensor) -> Scores:
    """Returns the scores of both sides on units [width, k]."""
    positive = torch.stack([(text.read @ units).amax(0) for text in sides.positive])
    return Scores(positive, torch.stack([(states @ units).amax(0) for states in sides.negative]))


def random_units(width: int, training: Sides, seed: int) -> Tensor:
    """Returns units [width, RANDOM_DIRECTIONS], each turned so that the positives that were trained on score higher."""
    generator = torch.Generator().manual_seed((seed + 2) & (2**63 - 1))
    units = torch.nn.functional.normalize(torch.randn(width, RANDOM_DIRECTIONS, generator=generator), dim=0)
    units = units.to(training.negative[0].device)
    up, down = scores(training, units), scores(training, -units)
    turned = (up.positive.mean(0) - up.negative.mean(0)) < (down.positive.mean(0) - down.negative.mean(0))
    return torch.where(turned, -units, units)


def measured(
    model: DifferentiableModel, vector: Tensor, training: Sides, heldout: Sides, at: Place, steps: int, seed: int
) -> Sliced[LayerEvidence]:
    """Returns the evidence of a vector [width], which is not 0."""
    difference = difference_of_means(training)
    random = random_units(len(vector), training, seed)
    units = torch.nn.functional.normalize(torch.stack([vector, difference], dim=1), dim=0)
    every = torch.cat([units, random], dim=1)
    learned, found = scores(training, every), scores(heldout, every)
    accuracy, areas = found.accuracy(learned.midpoint), found.auroc()
    losses = []
    for added in (torch.zeros_like(vector), vector, difference, *(random.T[:RANDOM_LOSSES] * vector.norm())):
        own = yield from text_losses(model, heldout.positive, [added] * len(heldout.positive), at)
        losses.append(float(np.mean(own)))
    positive, negative = [text.read for text in heldout.positive], heldout.negative
    n = sum(len(text.ordinary) for side in (training, heldout) for text in side.positive)
    n += sum(len(states) for side in (training, heldout) for states in side.negative)
    return LayerEvidence(
        layer=at.layer,
        heldout_accuracy=float(accuracy[0]),
        random_accuracy=float(accuracy[2:].mean()),
        norm=float(vector.norm()),
        activation_norm=float(torch.cat([*positive, *negative]).norm(dim=1).mean()),
        explained_variance=0.0,
        margin=found.margin(),
        midpoint=float(learned.midpoint[0]),
        positive_tokens=_projections(positive, units[:, 0]),
        negative_tokens=_projections(negative, units[:, 0]),
        pooled_tokens=n,
        training=TrainingEvidence(
            steps=steps,
            auroc=areas[0],
            difference_auroc=areas[1],
            random_auroc=float(np.mean(areas[2:])),
            difference_accuracy=float(accuracy[1]),
            unedited_loss=losses[0],
            loss=losses[1],
            difference_loss=losses[2],
            random_loss=float(np.mean(losses[3:])),
        ),
    )


def warnings(layers: Sequence[LayerEvidence]) -> tuple[str, ...]:
    """Returns what whoever uses the vector should know first, a sentence each."""
    own = [(e.layer, e, e.training) for e in layers if e.training is not None]
    said = (
        ([n for n, e, _ in own if e.heldout_accuracy <= e.random_accuracy], "detects no better than random directions"),
        ([n for n, _, t in own if t.auroc < t.difference_auroc], "detects worse than the difference of means"),
        ([n for n, _, t in own if t.loss >= t.unedited_loss], "makes held-out positives no likelier"),
        ([n for n, _, t in own if t.loss > t.difference_loss], "makes them less likely than the difference of means"),
    )
    return tuple(f"the vector {what} at layers {layers}" for layers, what in said if layers)


def _projections(texts: Sequence[Tensor], unit: Tensor) -> TokenProjections:
    return TokenProjections.of([value for states in texts for value in (states @ unit).tolist()])
