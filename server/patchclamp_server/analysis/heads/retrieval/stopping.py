"""When a ranking is stable: its k best heads are those of some successes earlier.

stop once |best_k(all n runs) and best_k(the first n - window)| / k ≥ agreement     and n ≥ min_successes
"""

from dataclasses import dataclass

from patchclamp_server.analysis.heads.retrieval.retrieval_scores import RetrievalScores, best, overlap
from patchclamp_server.errors import InvalidArgument


@dataclass(frozen=True)
class StoppingRule:
    """Has the fields and defaults of the message StoppingRule."""

    top_k: int = 10
    agreement: float = 0.9
    window: int = 6
    min_successes: int = 12

    def check(self, n_heads: int, path: str) -> None:
        """Raises InvalidArgument for a rule that says nothing about a model of `n_heads` heads in all layers."""
        if not 1 <= self.top_k <= n_heads:
            raise InvalidArgument(f"{path}.top_k", f"{self.top_k} is not in 1 to {n_heads}, the heads of the model")
        if not 0.0 < self.agreement <= 1.0:
            raise InvalidArgument(f"{path}.agreement", f"{self.agreement:g} is not a share above 0 and up to 1")
        for field in ("window", "min_successes"):
            if getattr(self, field) < 1:
                raise InvalidArgument(f"{path}.{field}", "must be at least 1")

    def holds(self, scores: RetrievalScores) -> bool:
        n = len(scores.runs)
        if n < self.min_successes or n <= self.window:
            return False
        earlier = scores.samples[: n - self.window].mean(dim=0)
        return overlap(best(scores.mean, self.top_k), best(earlier, self.top_k)) >= self.agreement
