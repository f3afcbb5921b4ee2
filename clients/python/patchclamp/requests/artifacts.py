"""Requests of ArtifactService."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from io import BytesIO
from pathlib import Path
from types import MappingProxyType
from typing import Any, TypedDict

from google.protobuf import json_format, struct_pb2

from patchclamp.fields import build, build_as, instance, shown
from patchclamp.names import (
    ARTIFACT_FORMATS,
    ARTIFACT_KINDS,
    SITES,
    ArtifactFormatName,
    ArtifactKindName,
    SiteName,
    value_of,
    value_or_unspecified,
)
from patchclamp.v1 import artifact_pb2

CHUNK_BYTES = 1 << 20


class StoredOptions(TypedDict, total=False):
    """Options of every request that stores an artifact.

    tags: names to store it under. replace_tags: whether tags are taken that name another artifact; otherwise they are
    refused before the work.
    """

    description: str
    tags: Sequence[str]
    replace_tags: bool


class UploadOptions(StoredOptions, total=False):
    """Options of an upload, besides StoredOptions.

    site: the site of a vector, by default resid_post, or the one that an autoencoder reads. model_fingerprint: by
    default that of the server's model. config: the second file of a format that has one, such as cfg.json of SAELens.
    layer: of an autoencoder whose file does not say it. of: id or tag of the autoencoder that feature_labels are about.
    tensor_names: {"layer.3": "steering_vector"}, what tensors of a safetensors file are called that has other names
    than the kind; "name[i]" is row i of a tensor. layer_offset: direction.n of a GGUF control vector becomes layer
    n + layer_offset. `imported_from` and `import_warnings` of the answer say what became of each tensor.
    """

    kind: ArtifactKindName
    format: ArtifactFormatName
    site: SiteName | None
    model_fingerprint: str
    provenance: Mapping[str, Any]
    config: str
    layer: int | None
    of: str
    tensor_names: Mapping[str, str]
    layer_offset: int


def upload(
    data: bytes | Path,
    *,
    kind: ArtifactKindName = "vector",
    format: ArtifactFormatName = "safetensors",
    site: SiteName | None = None,
    model_fingerprint: str = "",
    description: str = "",
    tags: Sequence[str] = (),
    replace_tags: bool = False,
    provenance: Mapping[str, Any] = MappingProxyType({}),
    config: str = "",
    layer: int | None = None,
    of: str = "",
    tensor_names: Mapping[str, str] = MappingProxyType({}),
    layer_offset: int = 0,
) -> Iterator[artifact_pb2.UploadRequest]:
    """Yields the header, then chunks of at most 1 MiB. data: the content of the file, or its path, which is read as it
    is sent."""
    size = data.stat().st_size if isinstance(data, Path) else len(instance(data, bytes, "data", "bytes or a Path"))
    header = build(
        artifact_pb2.UploadHeader,
        kind=value_of(ARTIFACT_KINDS, kind, "kind"),
        format=artifact_format(format),
        site=value_or_unspecified(SITES, site, "site"),
        model_fingerprint=model_fingerprint,
        description=description,
        tags=tags,
        replace_tags=replace_tags,
        size_bytes=size,
        provenance=_provenance(provenance),
        config=config,
        layer=layer,
        of=of,
        tensor_names=tensor_names,
        layer_offset=layer_offset,
    )
    return _upload_messages(header, data)


def list_artifacts(
    kind: ArtifactKindName | None, model_fingerprint: str, page_token: str
) -> artifact_pb2.ListArtifactsRequest:
    return build(
        artifact_pb2.ListArtifactsRequest,
        kind=value_or_unspecified(ARTIFACT_KINDS, kind, "kind"),
        model_fingerprint=model_fingerprint,
        page_token=page_token,
    )


def download(ref: str, format: ArtifactFormatName, layers: Iterable[int]) -> artifact_pb2.DownloadRequest:
    return build(artifact_pb2.DownloadRequest, ref=ref, format=artifact_format(format), layers=layers)


def tag_artifact(tag: str, ref: str, replace: bool) -> artifact_pb2.TagArtifactRequest:
    return build_as({"replace_tag": "replace"}, artifact_pb2.TagArtifactRequest, tag=tag, ref=ref, replace_tag=replace)


def artifact_format(name: ArtifactFormatName) -> artifact_pb2.ArtifactFormat.ValueType:
    return value_of(ARTIFACT_FORMATS, name, "format")


def _provenance(fields: Mapping[str, Any]) -> struct_pb2.Struct:
    """Returns the fields as a Struct. Raises TypeError for what JSON cannot write."""
    try:
        return json_format.ParseDict(dict(fields), struct_pb2.Struct())
    except (TypeError, ValueError, json_format.ParseError):
        raise TypeError(f"provenance: expected a dict that JSON can write, got {shown(fields)}") from None


def _upload_messages(header: artifact_pb2.UploadHeader, data: bytes | Path) -> Iterator[artifact_pb2.UploadRequest]:
    yield artifact_pb2.UploadRequest(header=header)
    with data.open("rb") if isinstance(data, Path) else BytesIO(data) as file:
        while chunk := file.read(CHUNK_BYTES):
            yield artifact_pb2.UploadRequest(chunk=chunk)
