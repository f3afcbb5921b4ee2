"""Requests of ArtifactService."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypedDict

from google.protobuf import json_format, struct_pb2

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


class UploadOptions(TypedDict, total=False):
    """site: of a vector, default resid_post. model_fingerprint: default the server's model."""

    kind: ArtifactKindName
    format: ArtifactFormatName
    site: SiteName
    model_fingerprint: str
    description: str
    tags: Sequence[str]
    provenance: Mapping[str, Any]


def upload(source: bytes | Path, options: UploadOptions) -> Iterator[artifact_pb2.UploadRequest]:
    """The header, then chunks of at most 1 MiB."""
    data = source.read_bytes() if isinstance(source, Path) else source
    header = artifact_pb2.UploadHeader(
        kind=value_of(ARTIFACT_KINDS, options.get("kind", "vector"), "kind"),
        format=artifact_format(options.get("format", "safetensors")),
        site=value_or_unspecified(SITES, options.get("site"), "site"),
        model_fingerprint=options.get("model_fingerprint", ""),
        description=options.get("description", ""),
        tags=options.get("tags", ()),
        size_bytes=len(data),
        provenance=json_format.ParseDict(dict(options.get("provenance", {})), struct_pb2.Struct()),
    )
    return _upload_messages(header, data)


def list_artifacts(
    kind: ArtifactKindName | None, model_fingerprint: str, page_token: str
) -> artifact_pb2.ListArtifactsRequest:
    return artifact_pb2.ListArtifactsRequest(
        kind=value_or_unspecified(ARTIFACT_KINDS, kind, "kind"),
        model_fingerprint=model_fingerprint,
        page_token=page_token,
    )


def download(ref: str, format: ArtifactFormatName, layers: Iterable[int]) -> artifact_pb2.DownloadRequest:
    return artifact_pb2.DownloadRequest(ref=ref, format=artifact_format(format), layers=layers)


def artifact_format(name: ArtifactFormatName) -> artifact_pb2.ArtifactFormat.ValueType:
    return value_of(ARTIFACT_FORMATS, name, "format")


def _upload_messages(header: artifact_pb2.UploadHeader, data: bytes) -> Iterator[artifact_pb2.UploadRequest]:
    yield artifact_pb2.UploadRequest(header=header)
    for start in range(0, len(data), CHUNK_BYTES):
        yield artifact_pb2.UploadRequest(chunk=data[start : start + CHUNK_BYTES])
