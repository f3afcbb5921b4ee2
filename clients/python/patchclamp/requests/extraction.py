"""Requests of SteeringService."""

from collections.abc import Iterable, Sequence
from typing import TypedDict

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
from patchclamp.v1 import steering_pb2


class ExtractOptions(TypedDict, total=False):
    """site: a residual site, default resid_post. layers: default every layer. tags: names to store the vector under."""

    site: SiteName
    layers: Iterable[int]
    pooling: PoolingName
    holdout_fraction: float
    seed: int
    description: str
    tags: Sequence[str]
    model: str


def extract_vectors(
    pairs: Iterable[tuple[PromptLike, PromptLike]], method: MethodName, options: ExtractOptions
) -> steering_pb2.ExtractVectorsRequest:
    """pairs: (positive, negative)."""
    return steering_pb2.ExtractVectorsRequest(
        model=options.get("model", ""),
        method=value_of(METHODS, method, "method"),
        pairs=[
            steering_pb2.ContrastPair(positive=prompt(positive, {}), negative=prompt(negative, {}))
            for positive, negative in pairs
        ],
        site=value_or_unspecified(SITES, options.get("site"), "site"),
        layers=list(options.get("layers", ())),
        pooling=value_or_unspecified(POOLINGS, options.get("pooling"), "pooling"),
        holdout_fraction=options.get("holdout_fraction"),
        seed=options.get("seed", 0),
        description=options.get("description", ""),
        tags=options.get("tags", ()),
    )
