"""The quality guard of sparse inference: some tokens are computed densely as well, and both predictions compared.

    divergence = KL(dense ‖ sparse) of the next token, nats

Sampled are the generated tokens at which `sample_rate` times their number passes a whole number: the same ones in every
batch, and again after a preemption.
"""

from collections import deque
from dataclasses import dataclass, field

import torch
from torch import Tensor

from patchclamp_server.engine.request import GuardReport, QualityGuard


@dataclass(eq=False)
class GuardState:
    """The samples of one sequence."""

    settings: QualityGuard
    sampled: int = 0
    agreed: int = 0
    total: float = 0.0
    last: deque[float] = field(default_factory=deque)

    def is_due(self, generated: int) -> bool:
        """Whether the prediction after generated token number `generated`, from 0, is a sample."""
        rate = self.settings.sample_rate
        return int((generated + 1) * rate) > int(generated * rate)

    def add(self, divergence: float, same_top1: bool) -> bool:
        """Adds a sample, and returns whether sparse inference has drifted too far."""
        self.sampled += 1
        self.agreed += same_top1
        self.total += divergence
        self.last.append(divergence)
        if len(self.last) > self.settings.window:
            self.last.popleft()
        full = len(self.last) == self.settings.window
        # This does not ask "above": a divergence that is not a number has drifted.
        return full and not sum(self.last) / len(self.last) <= self.settings.max_divergence

    def report(self, dense_from: int | None) -> GuardReport:
        n = max(1, self.sampled)
        return GuardReport(self.sampled, self.total / n, self.agreed / n, self.settings.max_divergence, dense_from)


def divergences(dense: Tensor, sparse: Tensor) -> list[tuple[float, bool]]:
    """Returns KL(dense ‖ sparse) and whether the first choice is the same, for each row of logits [n, vocab]."""
    return [_divergence(p, q) for p, q in zip(dense, sparse, strict=True)]


def _divergence(dense: Tensor, sparse: Tensor) -> tuple[float, bool]:
    # This goes row by row, and numpy sums: torch's sums depend on the number of rows and of threads.
    log_p, log_q = torch.log_softmax(dense.double(), dim=0), torch.log_softmax(sparse.double(), dim=0)
    kl = float((log_p.exp() * (log_p - log_q)).cpu().numpy().sum())
    return max(kl, 0.0), bool(log_p.argmax() == log_q.argmax())
