"""Requests of SteeringService."""

from collections.abc import Iterable, Sequence
from typing import Any

from patchclamp.fields import build, several, shown
from patchclamp.names import (
    METHODS,
    POOLINGS,
    SITES,
    MethodName,
    PoolingName,
    SiteName,
    value_of,
    value_or_unspecified,
)
from patchclamp.prompts import PromptLike, prompt
from patchclamp.requests.artifacts import StoredOptions
from patchclamp.v1 import steering_pb2


class ExtractOptions(StoredOptions, total=False):
    """Options of an extraction, besides StoredOptions.

    site: a residual site, by default resid_post. layers: by default every layer.
    """

    site: SiteName | None
    layers: Iterable[int]
    pooling: PoolingName | None
    holdout_fraction: float | None
    seed: int
    model: str


def extract_vectors(
    pairs: Iterable[tuple[PromptLike, PromptLike]],
    method: MethodName = "difference_of_means",
    *,
    site: SiteName | None = None,
    layers: Iterable[int] = (),
    pooling: PoolingName | None = None,
    holdout_fraction: float | None = None,
    seed: int = 0,
    description: str = "",
    tags: Sequence[str] = (),
    replace_tags: bool = False,
    model: str = "",
) -> steering_pb2.ExtractVectorsRequest:
    """Returns a request for a vector from pairs (positive, negative)."""
    listed = several(pairs, "pairs", "(positive, negative)")
    return build(
        steering_pb2.ExtractVectorsRequest,
        model=model,
        method=value_of(METHODS, method, "method"),
        pairs=[_pair(pair, f"pairs[{i}]") for i, pair in enumerate(listed)],
        site=value_or_unspecified(SITES, site, "site"),
        layers=layers,
        pooling=value_or_unspecified(POOLINGS, pooling, "pooling"),
        holdout_fraction=holdout_fraction,
        seed=seed,
        description=description,
        tags=tags,
        replace_tags=replace_tags,
    )


def _pair(pair: Any, field: str) -> steering_pb2.ContrastPair:
    match pair:
        case (positive, negative):
            return steering_pb2.ContrastPair(
                positive=prompt(positive, field=f"{field}[0]"), negative=prompt(negative, field=f"{field}[1]")
            )
        case _:
            raise TypeError(f"{field}: expected (positive, negative), got {shown(pair)}")
