"""Training at the exclusive door: steps in batches, and an end where the held-out loss no longer falls.

Evaluated are the state before the first step, that after the last, and in between one an epoch, or one in
EVALUATE_EVERY steps where an epoch has fewer. What had the lowest held-out loss is kept.
"""

from collections.abc import Callable
from dataclasses import dataclass
from itertools import count
from typing import Generic, TypeVar

import torch

from patchclamp_server.analysis.progress import Progress
from patchclamp_server.engine.exclusive import Sliced, Telling

# Steps between evaluations, where an epoch has fewer.
EVALUATE_EVERY = 10

S = TypeVar("S")


@dataclass(frozen=True)
class Training:
    max_steps: int = 500
    learning_rate: float = 0.005
    batch_size: int = 16
    patience: int = 5


@dataclass(frozen=True, eq=False)
class Trained(Generic[S]):
    """`best`: the state with the lowest held-out loss, which is `loss`; `losses`: of each step, before it."""

    best: S
    loss: float
    losses: tuple[float, ...]


def batch_order(n: int, batch_size: int, seed: int, step: int) -> list[int]:
    """Returns the examples of a step, from 0 on: the n of them in an order of their own in each epoch."""
    size = min(batch_size, n)
    places = range(step * size, (step + 1) * size)
    found = []
    for place in places:
        epoch, index = divmod(place, n)
        found.append(_shuffled(n, seed, epoch)[index])
    return found


def train(
    training: Training,
    n: int,
    stage: str,
    evaluate: Callable[[], Sliced[tuple[S, float]]],
    step: Callable[[int], Sliced[float]],
) -> Telling[Progress, Trained[S]]:
    """A work at the exclusive door, which tells its steps as `stage`. `n`: examples of an epoch.

    `evaluate` gives the state as it is and its held-out loss; `step` takes the number of a step, from 0 on, changes the
    state, and gives the loss before it. Training ends after `max_steps`, or when the held-out loss has not fallen for
    `patience` evaluations.
    """
    every = max(EVALUATE_EVERY, -(-n // training.batch_size))
    losses: list[float] = []
    best, best_loss = yield from evaluate()
    waited = 0
    for number in count(1):
        losses.append((yield from step(number - 1)))
        yield Progress(stage, number, training.max_steps)
        if number % every == 0 or number == training.max_steps:
            state, loss = yield from evaluate()
            if loss < best_loss:
                best, best_loss, waited = state, loss, 0
            else:
                waited += 1
        if number == training.max_steps or waited >= training.patience:
            break
    return Trained(best, best_loss, tuple(losses))


def _shuffled(n: int, seed: int, epoch: int) -> list[int]:
    generator = torch.Generator().manual_seed((seed * 1_000_003 + epoch) & (2**63 - 1))
    order: list[int] = torch.randperm(n, generator=generator).tolist()
    return order
