"""Evidence card of a steering vector: how well it tells the sides of held-out pairs apart, beside random directions."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from patchclamp_server.analysis.steering.token_projections import TokenProjections
from patchclamp_server.errors import InvalidArgument

RANDOM_DIRECTIONS = 32
MIN_TRAINING_PAIRS = 2
# On SmolLM2-135M, of 576 coordinates, differences of means of sinks lie in 2 to 5, those of other tokens in 55 or more.
FEW_COORDINATES = 8.0


@dataclass(frozen=True)
class TrainingEvidence:
    """Of a trained method, on held-out texts; fields as in the message TrainingEvidence (reft_r1/evidence.py)."""

    steps: int
    auroc: float
    random_auroc: float
    difference_auroc: float
    difference_accuracy: float
    unedited_loss: float
    loss: float
    random_loss: float
    difference_loss: float


@dataclass(frozen=True)
class LayerEvidence:
    """What was measured at one layer, on held-out pairs.

    heldout_accuracy: share of examples on the right side of the midpoint.
    random_accuracy: the same for random directions, threshold and sign fitted to the training pairs; mean over
        RANDOM_DIRECTIONS of them. Accuracy does not depend on the norm.
    norm, activation_norm: of the vector, and the mean over the (pooled) activations it is added to.
    explained_variance: Σ (d_i · u)² / Σ ‖d_i‖² over the pair differences d_i, for the unit vector u.
    participation_ratio: (Σ v_j)² / Σ v_j² with v_j = Σ_i d_ij² over the differences of all pairs: how many coordinates
        carry what the sides differ in. Few are a sign of outliers that hide everything else.
    pooled_tokens, tokens_left_out: of the examples of all pairs, how many tokens stand for them, and how many others
        were passed over as outliers (interventions/pooling.py).
    margin: (mean h⁺·u - mean h⁻·u) / pooled standard deviation within the sides; 0 when nothing varies.
    midpoint: (mean h⁺·u + mean h⁻·u) / 2 over the training pairs, of pooled states, on the scale of gates; None of
        methods that are not of two sides of states.
    positive_tokens, negative_tokens: h·u of single tokens of each side of the held-out pairs.
    training: of trained methods alone.
    """

    layer: int
    heldout_accuracy: float
    random_accuracy: float
    norm: float
    activation_norm: float
    explained_variance: float
    margin: float
    midpoint: float | None
    positive_tokens: TokenProjections | None = None
    negative_tokens: TokenProjections | None = None
    participation_ratio: float = 0.0
    pooled_tokens: int = 0
    tokens_left_out: int = 0
    training: TrainingEvidence | None = None


@dataclass(frozen=True)
class Sides:
    """The activations of both sides: positive [n, d] and negative [m, d], or with several layers [n, layers, d].

    Of pairs, row i of both is from pair i; where the sides are no pairs, they are in random order, and rows of equal
    number count as pairs as far as both go.
    """

    positive: torch.Tensor
    negative: torch.Tensor

    def at(self, row: int) -> "Sides":
        """Returns both sides at one of several layers."""
        return Sides(self.positive[:, row], self.negative[:, row])

    def differences(self) -> torch.Tensor:
        """Returns the differences [min(n, m), d] of the pairs."""
        n = min(len(self.positive), len(self.negative))
        return self.positive[:n] - self.negative[:n]

    def apart(self) -> torch.Tensor:
        """Returns the difference [d] of the means of both sides."""
        return self.positive.mean(dim=0) - self.negative.mean(dim=0)


def training_pairs(n_pairs: int, holdout_fraction: float, field: str = "pairs") -> int:
    """Returns how many pairs to learn from; at least one other is held out. Raises InvalidArgument on too few."""
    heldout = max(1, round(n_pairs * holdout_fraction))
    training = n_pairs - heldout
    if training < MIN_TRAINING_PAIRS:
        raise InvalidArgument(
            field,
            f"{n_pairs} {field} at holdout_fraction {holdout_fraction:g} leave {max(training, 0)} to learn from; "
            f"need at least {MIN_TRAINING_PAIRS}, and 1 held out",
        )
    return training


def shuffled(n_pairs: int, seed: int) -> list[int]:
    """Returns a seeded order of the pairs. The first `training_pairs(...)` of it are learned from."""
    order: list[int] = torch.randperm(n_pairs, generator=torch.Generator().manual_seed(seed)).tolist()
    return order


def layer_evidence(layer: int, direction: torch.Tensor, training: Sides, heldout: Sides, seed: int) -> LayerEvidence:
    """Returns the evidence of direction [d]. A zero direction raises no error; it is at chance by definition."""
    unit = torch.nn.functional.normalize(direction, dim=0)
    random = _random_units(len(direction), training, seed)
    differences = heldout.differences()
    total = differences.square().sum()
    return LayerEvidence(
        layer=layer,
        heldout_accuracy=float(_accuracy(unit[:, None], training, heldout)),
        random_accuracy=float(_accuracy(random, training, heldout).mean()),
        norm=float(direction.norm()),
        activation_norm=float(torch.cat([heldout.positive, heldout.negative]).norm(dim=1).mean()),
        explained_variance=float((differences @ unit).square().sum() / total) if total > 0 else 0.0,
        margin=_margin(unit, heldout),
        midpoint=float(_midpoint(unit[:, None], training)),
        participation_ratio=_participation_ratio(training, heldout),
    )


def best_layer(layers: Sequence[LayerEvidence]) -> int:
    """Returns the layer with the best held-out accuracy; among equals the one with the larger margin."""
    return max(layers, key=lambda e: (e.heldout_accuracy, e.margin)).layer


def warnings(layers: Sequence[LayerEvidence]) -> tuple[str, ...]:
    """Returns what whoever uses the vector should know first, a sentence each."""
    narrow = [e for e in layers if 0 < e.participation_ratio < FEW_COORDINATES]
    if not narrow:
        return ()
    named = ", ".join(f"{e.layer} ({e.participation_ratio:.1f})" for e in narrow)
    return (
        "few coordinates carry what the sides differ in, and may hide the rest, at layers (participation ratio, below "
        f"{FEW_COORDINATES:g}): {named}; compare held-out accuracy with the other pooling and logistic_probe",
    )


def _participation_ratio(training: Sides, heldout: Sides) -> float:
    """Computes in float64: fourth powers of large activations would overflow float32."""
    differences = torch.cat((training.differences(), heldout.differences()))
    variance = differences.double().square().sum(dim=0)
    total = variance.sum()
    return float(total**2 / variance.square().sum()) if total > 0 else 0.0


def _accuracy(units: torch.Tensor, training: Sides, heldout: Sides) -> torch.Tensor:
    """Returns the held-out accuracy [k] of each of units [d, k]."""
    threshold = _midpoint(units, training)
    above = (heldout.positive @ units > threshold).float().mean(dim=0)
    below = (heldout.negative @ units < threshold).float().mean(dim=0)
    return (above + below) / 2


def _midpoint(units: torch.Tensor, training: Sides) -> torch.Tensor:
    """Returns the points [k] half-way between the mean projections of both sides, for units [d, k]."""
    return ((training.positive @ units).mean(dim=0) + (training.negative @ units).mean(dim=0)) / 2


def _random_units(width: int, training: Sides, seed: int) -> torch.Tensor:
    """Returns units [d, RANDOM_DIRECTIONS], each turned so that the positives of the training pairs project higher."""
    generator = torch.Generator().manual_seed(seed)
    units = torch.nn.functional.normalize(torch.randn(width, RANDOM_DIRECTIONS, generator=generator), dim=0)
    difference = training.apart() @ units
    return torch.where(difference < 0, -units, units)


def _margin(unit: torch.Tensor, heldout: Sides) -> float:
    positive, negative = heldout.positive @ unit, heldout.negative @ unit
    variance = (positive.var(correction=0) + negative.var(correction=0)) / 2
    return float((positive.mean() - negative.mean()) / variance.sqrt()) if variance > 0 else 0.0
