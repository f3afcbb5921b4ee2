"""What requests that score the same text make of it, against one of them: on the device, token by token.

    divergence = KL(reference ‖ other) = Σ_i p_i (log p_i - log q_i)     nats, of the next token, never below 0
    top-1 agreement: both have the same first choice

Requests bring log-probabilities to a `ScoreReducer` (Request.scores). Those of the reference are kept, float32 [vocab]
for each token: 4 · vocab · tokens bytes, so that whoever makes one bounds the tokens. Of the others sums are kept.
"""

from typing import Protocol

import torch
from torch import Tensor


class ScoreReducer(Protocol):
    """Takes the log-probabilities of a request. `add` is called on the engine's thread for every scored token once, in
    their order."""

    def add(self, position: int, logprobs: Tensor) -> None:
        """Takes logprobs [vocab] of the token at `position`."""
        ...


class Reference:
    """Keeps the log-probabilities of the tokens from position `start` on."""

    def __init__(self, start: int) -> None:
        self.start = start
        self.logprobs: dict[int, Tensor] = {}

    def add(self, position: int, logprobs: Tensor) -> None:
        if position >= self.start:
            self.logprobs[position] = logprobs


class Divergence:
    """Compares a request with a reference that has finished, at the tokens which that one kept."""

    def __init__(self, reference: Reference) -> None:
        self._reference = reference
        self._divergences: list[Tensor] = []
        self._agreed: list[Tensor] = []

    def add(self, position: int, logprobs: Tensor) -> None:
        if position < self._reference.start:
            return
        own = self._reference.logprobs[position]
        # This goes row by row: the sum over the vocabulary does not depend on the other tokens of a step.
        self._divergences.append(torch.linalg.vecdot(own.exp(), own - logprobs))
        self._agreed.append(own.argmax() == logprobs.argmax())

    def means(self) -> tuple[float, float]:
        """Returns the mean divergence, and the share of tokens with the same first choice."""
        divergences = torch.stack(self._divergences).double().clamp_min(0.0)
        return float(divergences.mean()), float(torch.stack(self._agreed).double().mean())
