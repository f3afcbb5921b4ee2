"""Checks of what is stored beside tensors: metadata and tag names. Field paths name arguments of ArtifactStore.put."""

import json
import math
import re
from collections.abc import Mapping
from typing import Any

from patchclamp_server.artifacts.types import OF_NO_MODEL, WITH_SITE, ArtifactKind, Metadata
from patchclamp_server.errors import InvalidArgument
from patchclamp_server.model.sites import Site

MAX_METADATA_BYTES = 256 * 1024
MAX_DEPTH = 32
TAG = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}")


def check_tag(tag: str, path: str = "tag") -> None:
    """A tag is 1 to 128 letters, digits, '.', '_' and '-', and starts with a letter or digit: never a path."""
    if not TAG.fullmatch(tag):
        raise InvalidArgument(path, f"{tag!r} is not a tag name; accepted: {TAG.pattern}")


def checked_metadata(metadata: Metadata) -> Metadata:
    """Returns the metadata in its one canonical form, so that equal content has one id."""
    site = metadata.site
    if metadata.kind in WITH_SITE and site is None:
        raise InvalidArgument("site", f"the site is missing that the {metadata.kind.value} belongs to")
    if metadata.kind is ArtifactKind.NEURON_SET:
        if site not in (None, Site.MLP_POST):
            raise InvalidArgument("site", "neuron sets sit at mlp_post; leave the site empty")
        site = None
    if metadata.kind not in WITH_SITE and site is not None:
        raise InvalidArgument("site", f"a {metadata.kind.value} has no site; leave it empty")
    policy = metadata.provenance.get("policy")
    if metadata.kind is ArtifactKind.SPARSITY_PROFILE and not (isinstance(policy, str) and policy):
        raise InvalidArgument("provenance.policy", "a sparsity_profile needs the name of its policy")
    watch = metadata.provenance.get("watch")
    if metadata.kind is ArtifactKind.WATCH_REFERENCE and not (isinstance(watch, str) and watch):
        raise InvalidArgument("provenance.watch", "a watch_reference needs the id of its watch")
    if metadata.kind in OF_NO_MODEL and metadata.model_fingerprint:
        raise InvalidArgument("model_fingerprint", f"a {metadata.kind.value} is of no model; leave it empty")
    if metadata.kind not in OF_NO_MODEL and not metadata.model_fingerprint:
        raise InvalidArgument("model_fingerprint", "an artifact belongs to a model; the fingerprint is empty")
    fingerprint = _canonical(metadata.model_fingerprint, "model_fingerprint", 0)
    description = _canonical(metadata.description, "description", 0)
    provenance = _canonical(dict(metadata.provenance), "provenance", 0)
    evidence = _canonical(dict(metadata.evidence), "evidence", 0)
    sizes = {
        name: len(json.dumps(value, separators=(",", ":")))
        for name, value in (
            ("model_fingerprint", fingerprint),
            ("description", description),
            ("provenance", provenance),
            ("evidence", evidence),
        )
    }
    if sum(sizes.values()) > MAX_METADATA_BYTES:
        message = f"metadata of {sum(sizes.values())} bytes; at most {MAX_METADATA_BYTES} are stored"
        raise InvalidArgument(max(sizes, key=sizes.__getitem__), message)
    return Metadata(metadata.kind, fingerprint, site, description, provenance, evidence)


def _canonical(value: Any, path: str, depth: int) -> Any:
    """Returns JSON with lists for tuples and 3 for 3.0: protobuf's Struct knows only doubles, yet the id must stay."""
    if depth > MAX_DEPTH:
        raise InvalidArgument(path, f"nested deeper than {MAX_DEPTH}")
    if value is None or isinstance(value, bool):
        return value
    if isinstance(value, str):
        # A lone surrogate can be put into JSON but not into a protobuf message.
        if any("\ud800" <= c <= "\udfff" for c in value):
            raise InvalidArgument(path, "text is not valid Unicode")
        return value
    if isinstance(value, int | float):
        # This rejects NaN, Inf and integers that no double can hold.
        if not -1.7e308 < value < 1.7e308:
            raise InvalidArgument(path, f"{value!r:.40} is not a finite number")
        integral = isinstance(value, int) or (math.fabs(value) < 2**53 and value.is_integer())
        return int(value) if integral else float(value)
    if isinstance(value, list | tuple):
        return [_canonical(v, f"{path}[{i}]", depth + 1) for i, v in enumerate(value)]
    if isinstance(value, Mapping):
        for key in value:
            if not isinstance(key, str):
                raise InvalidArgument(path, f"the key {key!r} is not text")
        return {_canonical(k, path, depth): _canonical(v, f"{path}.{k}", depth + 1) for k, v in value.items()}
    raise InvalidArgument(path, f"{type(value).__name__} cannot be written as JSON")
