"""Heads by their scores, best first, and the threshold of a head set."""

from collections.abc import Mapping
from typing import Any, NamedTuple

from torch import Tensor

# That of retrieval heads (Wu et al. 2024); a head set that names none, such as an imported one, has it.
DEFAULT_THRESHOLD = 0.1


class Head(NamedTuple):
    layer: int
    head: int


def ranked(scores: Tensor) -> tuple[Head, ...]:
    """Returns all heads of scores [n_layers, n_heads], best first; heads with equal scores by layer and head."""
    order = scores.flatten().argsort(descending=True, stable=True)
    return tuple(Head(*divmod(index, scores.shape[1])) for index in order.tolist())


def threshold_of(evidence: Mapping[str, Any]) -> float:
    """Returns the threshold of a head set with this evidence. Raises ValueError for one that is no number."""
    threshold = evidence.get("threshold", DEFAULT_THRESHOLD)
    if isinstance(threshold, bool) or not isinstance(threshold, int | float):
        raise ValueError(f"a threshold that is no number: {threshold!r:.40}")
    return float(threshold)


def from_threshold(scores: Tensor, threshold: float) -> tuple[Head, ...]:
    """Returns the heads of scores [n_layers, n_heads] that reach a threshold, best first."""
    return ranked(scores)[: int((scores >= threshold).sum())]
