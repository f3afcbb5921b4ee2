"""Requests of ProbeService."""

from collections.abc import Iterable, Sequence

from patchclamp.fields import build
from patchclamp.names import (
    POOLINGS,
    PROBE_METHODS,
    SITES,
    PoolingName,
    ProbeMethodName,
    SiteName,
    value_of,
    value_or_unspecified,
)
from patchclamp.neurons import TextsLike, texts_message
from patchclamp.programs.scopes import ScopeLike, scope_message
from patchclamp.requests.artifacts import StoredOptions
from patchclamp.v1 import probe_pb2 as pb


class ProbeOptions(StoredOptions, total=False):
    """Options of the training of a probe, besides StoredOptions.

    target: the label whose probability is served, by default the first. site: any, by default resid_post. layers: one
    or several, whose activations stand side by side; by default the one that reads best. pooling: what stands for a
    text, by default its last token. scope: tokens that are pooled. penalty: strength of the L2 penalty, by default
    chosen by cross-validation. holdout_fraction: share of the texts kept out, half for the calibration and half for the
    report, by default 0.4.
    """

    target: str
    site: SiteName | None
    layers: Iterable[int]
    pooling: PoolingName | None
    scope: ScopeLike | None
    penalty: float | None
    holdout_fraction: float | None
    seed: int
    model: str


def train_probe(
    texts: TextsLike,
    method: ProbeMethodName = "logistic",
    *,
    target: str = "",
    site: SiteName | None = None,
    layers: Iterable[int] = (),
    pooling: PoolingName | None = None,
    scope: ScopeLike | None = None,
    penalty: float | None = None,
    holdout_fraction: float | None = None,
    seed: int = 0,
    description: str = "",
    tags: Sequence[str] = (),
    replace_tags: bool = False,
    model: str = "",
) -> pb.TrainProbeRequest:
    """Returns a request for a probe of texts by label; of "ridge" the labels are numbers."""
    return build(
        pb.TrainProbeRequest,
        model=model,
        method=value_of(PROBE_METHODS, method, "method"),
        texts=texts_message(texts),
        target=target,
        site=value_or_unspecified(SITES, site, "site"),
        layers=layers,
        pooling=value_or_unspecified(POOLINGS, pooling, "pooling"),
        scope=scope_message(scope),
        penalty=penalty,
        holdout_fraction=holdout_fraction,
        seed=seed,
        description=description,
        tags=tags,
        replace_tags=replace_tags,
    )
