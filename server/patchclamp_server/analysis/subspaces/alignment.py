"""Distributed alignment search: a subspace that carries one variable, trained by interchange interventions.

    maximise over W [width, rank]   mean over pairs of log p(answer | h' = h_base + Rᵀ R (h_source - h_base))
    R = Qᵀ of W = Q T, with T upper triangular and its diagonal positive

by Adam on W. With pairs that differ in another variable and are to keep their answers (MDAS), the mean is over these
too, as many of them in each step. Training ends when the held-out loss has not fallen for `patience` evaluations; the R
of the lowest one is kept.

Source: METHODS V1; Geiger et al. 2024, Finding Alignments Between Interpretable Causal Variables and Distributed Neural
Representations; MDAS: Huang et al. 2024, RAVEL.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from patchclamp_server.analysis.neurons.backward import differentiated
from patchclamp_server.analysis.neurons.products import DifferentiableModel
from patchclamp_server.analysis.neurons.targets import LogitDifference, LogProbability
from patchclamp_server.analysis.progress import Progress
from patchclamp_server.analysis.subspaces.interchange import PreparedPair, intervened
from patchclamp_server.analysis.training import Training, batch_order, train
from patchclamp_server.engine.exclusive import Slice, Sliced, Telling
from patchclamp_server.model.sites import Site


@dataclass(frozen=True, eq=False)
class Examples:
    """Prepared pairs of one layer; `kept` are those of MDAS."""

    training: list[PreparedPair]
    heldout: list[PreparedPair]
    kept: list[PreparedPair]
    kept_heldout: list[PreparedPair]
    # What an answer is compared with: of `heldout` what the base says, of `kept_heldout` what the source says.
    against: list[int]
    kept_against: list[int]


@dataclass(frozen=True, eq=False)
class Alignment:
    """`rotation` [rank, width] float32 on the CPU, and what was measured on held-out pairs.

    accuracy: share whose answer is likelier than what the base says without an intervention. kept_accuracy: of kept
    pairs, share whose answer is likelier than what the source says; None without such pairs. `losses`: of each step.
    """

    rotation: Tensor
    loss: float
    steps: int
    accuracy: float
    random_accuracy: float
    full_accuracy: float
    kept_accuracy: float | None
    losses: tuple[float, ...]


def initial_weights(width: int, rank: int, seed: int) -> Tensor:
    """Returns W [width, rank] before training, float32."""
    return torch.randn(width, rank, generator=torch.Generator().manual_seed(seed & (2**63 - 1)))


def rotation_of(weights: Tensor) -> Tensor:
    """Returns R [rank, width] of W [width, rank]."""
    q, t = torch.linalg.qr(weights)
    rows: Tensor = (q * torch.sign(torch.diagonal(t))).T
    return rows


def align(
    model: DifferentiableModel, examples: Examples, layer: int, site: Site, rank: int, training: Training, seed: int
) -> Telling[Progress, Alignment]:
    """A work at the exclusive door, which tells its steps: passes of a batch are sliced by blocks (backward.py), and a
    step of Adam is a slice."""
    width = model.decoder.spec.sites[site]
    weights, optimizer = _begin(width, rank, training, seed, model.decoder.device)

    def evaluate() -> Sliced[tuple[Tensor, float]]:
        rotation = _rotation(weights)
        loss = yield from _loss(model, [*examples.heldout, *examples.kept_heldout], rotation, layer, site)
        return rotation, loss

    def step(number: int) -> Sliced[float]:
        n, size = len(examples.training), training.batch_size
        chosen = [examples.training[i] for i in batch_order(n, size, seed, number)]
        if examples.kept:
            chosen += [examples.kept[i] for i in batch_order(len(examples.kept), size, seed + 1, number)]
        return (yield from _train(model, chosen, weights, optimizer, layer, site))

    trained = yield from train(training, len(examples.training), f"training of layer {layer}", evaluate, step)
    best = trained.best
    random = _rotation(initial_weights(width, rank, seed + 1).to(weights.device))
    heldout, against = examples.heldout, examples.against
    accuracy = yield from _accuracy(model, heldout, against, best, layer, site)
    by_random = yield from _accuracy(model, heldout, against, random, layer, site)
    by_all = yield from _accuracy(model, heldout, against, None, layer, site)
    kept = None
    if examples.kept_heldout:
        kept = yield from _accuracy(model, examples.kept_heldout, examples.kept_against, best, layer, site)
    n = len(trained.losses)
    return Alignment(best.cpu(), trained.loss, n, accuracy, by_random, by_all, kept, trained.losses)


def exchanged(pair: PreparedPair, rotation: Tensor | None) -> Tensor:
    """Returns h' [n, width] at the exchanged tokens; without a rotation those of the source."""
    if rotation is None:
        return pair.source
    return pair.states[pair.exchanged] + pair.difference @ rotation.T @ rotation


def _train(
    model: DifferentiableModel,
    pairs: Sequence[PreparedPair],
    weights: Tensor,
    optimizer: torch.optim.Optimizer,
    layer: int,
    site: Site,
) -> Sliced[float]:
    """One step of Adam. Returns the loss before it."""
    rotation = _rotation(weights)
    states = [exchanged(pair, rotation) for pair in pairs]
    asked = [pair.example(LogProbability(pair.pair.answer)) for pair in pairs]
    outcome = yield from intervened(model, pairs, states, asked, layer, site, gradients=True)
    yield Slice(1)
    _step(pairs, outcome.gradients, weights, optimizer)
    return -sum(outcome.values) / len(pairs)


def _loss(
    model: DifferentiableModel, pairs: Sequence[PreparedPair], rotation: Tensor, layer: int, site: Site
) -> Sliced[float]:
    states = [exchanged(pair, rotation) for pair in pairs]
    asked = [pair.example(LogProbability(pair.pair.answer)) for pair in pairs]
    outcome = yield from intervened(model, pairs, states, asked, layer, site, gradients=False)
    return -sum(outcome.values) / len(pairs)


def _accuracy(
    model: DifferentiableModel,
    pairs: Sequence[PreparedPair],
    against: Sequence[int],
    rotation: Tensor | None,
    layer: int,
    site: Site,
) -> Sliced[float]:
    """Share of pairs whose answer begins with a token that is likelier than the one it is compared with. Where both are
    one token, there is nothing to tell apart, and the pair counts as right."""
    differing = [i for i, pair in enumerate(pairs) if pair.pair.answer[0] != against[i]]
    own = [pairs[i] for i in differing]
    asked = [pairs[i].example(LogitDifference(pairs[i].pair.answer[0], against[i])) for i in differing]
    states = [exchanged(pair, rotation) for pair in own]
    outcome = yield from intervened(model, own, states, asked, layer, site, gradients=False)
    right = sum(value > 0 for value in outcome.values) + len(pairs) - len(own)
    return right / len(pairs)


# Works at the exclusive door run in inference mode, whose tensors take no part in a backward pass.
@differentiated
def _begin(
    width: int, rank: int, training: Training, seed: int, device: torch.device
) -> tuple[Tensor, torch.optim.Optimizer]:
    weights = initial_weights(width, rank, seed).to(device).requires_grad_()
    return weights, torch.optim.Adam([weights], lr=training.learning_rate)


@differentiated
def _rotation(weights: Tensor) -> Tensor:
    return rotation_of(weights.detach())


@differentiated
def _step(
    pairs: Sequence[PreparedPair], gradients: Sequence[Tensor], weights: Tensor, optimizer: torch.optim.Optimizer
) -> None:
    """∂loss/∂W through h' = h_base + Rᵀ R (h_source - h_base), from ∂F/∂h'."""
    difference = torch.cat([pair.difference for pair in pairs]).clone()
    of_states = torch.cat(list(gradients)).clone()
    rotation = rotation_of(weights)
    through = (difference @ rotation.T @ rotation * of_states).sum()
    optimizer.zero_grad()
    (-through / len(pairs)).backward()  # type: ignore[no-untyped-call]
    optimizer.step()
