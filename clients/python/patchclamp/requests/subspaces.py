"""Requests of FindSubspace."""

from collections.abc import Iterable, Sequence

from patchclamp.fields import build, instance
from patchclamp.names import SITES, SiteName, value_or_unspecified
from patchclamp.programs.scopes import ScopeLike, scope_message
from patchclamp.requests.artifacts import StoredOptions
from patchclamp.v1 import steering_pb2


class SubspaceOptions(StoredOptions, total=False):
    """Options of the search for a subspace, besides StoredOptions.

    site: by default resid_post. layers: each has a subspace of its own, by default every layer. scope: which tokens are
    read or exchanged, by default the last one of a prompt.
    """

    site: SiteName | None
    layers: Iterable[int]
    scope: ScopeLike | None
    seed: int
    model: str


def find_subspace(
    method: steering_pb2.FindSubspaceRequest,
    *,
    site: SiteName | None = None,
    layers: Iterable[int] = (),
    scope: ScopeLike | None = None,
    seed: int = 0,
    description: str = "",
    tags: Sequence[str] = (),
    replace_tags: bool = False,
    model: str = "",
) -> steering_pb2.FindSubspaceRequest:
    """Returns a request for a subspace. method: what patchclamp.subspaces makes."""
    expected = "circular_plane or interchange of patchclamp.subspaces"
    request = steering_pb2.FindSubspaceRequest()
    request.CopyFrom(instance(method, steering_pb2.FindSubspaceRequest, "method", expected))
    options = build(
        steering_pb2.FindSubspaceRequest,
        model=model,
        site=value_or_unspecified(SITES, site, "site"),
        layers=layers,
        scope=scope_message(scope),
        seed=seed,
        description=description,
        tags=tags,
        replace_tags=replace_tags,
    )
    request.MergeFrom(options)
    return request
