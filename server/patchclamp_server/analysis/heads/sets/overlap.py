"""How alike two head sets are.

jaccard             = |A and B| / |A or B|
overlap coefficient = |A and B| / min(|A|, |B|)
expected common     = |A| |B| / n             for random sets of these sizes among n heads (hypergeometric mean)
rank correlation    = Spearman's, of the scores of all heads; equal scores share their mean rank
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations

import torch
from torch import Tensor

from patchclamp_server.artifacts.head_sets import check_top_k, load_head_set
from patchclamp_server.artifacts.store import ArtifactStore
from patchclamp_server.errors import FailedPrecondition, InvalidArgument

MAX_HEAD_SETS = 64


@dataclass(frozen=True)
class HeadSetOverlap:
    """Has the fields of the message HeadSetComparison; `first` and `second` are indices of the sets compared."""

    first: int
    second: int
    jaccard: float
    overlap_coefficient: float
    expected_common: float
    common: int
    rank_correlation: float


def compare(refs: Sequence[str], top_k: int, store: ArtifactStore) -> tuple[HeadSetOverlap, ...]:
    """Compares each pair of head sets by their `top_k` best heads or, with 0, those with at least the set's threshold.

    They may be of several models, such as a base model and what was made of it, with the same number of heads. Raises
    InvalidArgument (field path), NotFound, or FailedPrecondition for a set without heads.
    """
    if not 2 <= len(refs) <= MAX_HEAD_SETS:
        raise InvalidArgument("head_sets", f"{len(refs)} head sets; 2 to {MAX_HEAD_SETS} are compared")
    sets = [load_head_set(ref, store, f"head_sets[{i}]") for i, ref in enumerate(refs)]
    shape = sets[0].scores.shape
    for i, other in enumerate(sets):
        if other.scores.shape != shape:
            has, wanted = (" x ".join(map(str, scores)) for scores in (other.scores.shape, shape))
            raise InvalidArgument(f"head_sets[{i}]", f"{refs[i]} has scores of {has} heads, {refs[0]} of {wanted}")
    check_top_k(top_k, n := shape.numel(), "top_k")
    chosen = [set(head_set.best(top_k)) for head_set in sets]
    for i, heads in enumerate(chosen):
        if not heads:
            raise FailedPrecondition(f"head_sets[{i}]", f"no head of {refs[i]} reaches its threshold; name a top_k")
    overlaps = []
    for i, k in combinations(range(len(sets)), 2):
        a, b = chosen[i], chosen[k]
        common = len(a & b)
        overlaps.append(
            HeadSetOverlap(
                i,
                k,
                jaccard=common / len(a | b),
                overlap_coefficient=common / min(len(a), len(b)),
                expected_common=len(a) * len(b) / n,
                common=common,
                rank_correlation=rank_correlation(sets[i].scores, sets[k].scores),
            )
        )
    return tuple(overlaps)


def rank_correlation(a: Tensor, b: Tensor) -> float:
    """Returns Spearman's correlation of tensors of one shape, or 0 where one of them is constant."""
    ranks = torch.stack((_ranks(a), _ranks(b)))
    ranks -= ranks.mean(dim=1, keepdim=True)
    norms = ranks.norm(dim=1).prod()
    return float(ranks.prod(dim=0).sum() / norms) if norms > 0 else 0.0


def _ranks(values: Tensor) -> Tensor:
    """Returns ranks from 1, flat float64; equal values have the mean of their ranks."""
    flat = values.flatten()
    ordered = flat.sort().values
    below, upto = torch.searchsorted(ordered, flat), torch.searchsorted(ordered, flat, right=True)
    return (below + 1 + upto).double() / 2
