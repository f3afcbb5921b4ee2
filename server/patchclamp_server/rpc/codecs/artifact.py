"""Turns artifacts into messages and back: kinds, formats, information, provenance."""

from collections.abc import Iterable, Mapping
from typing import Any, TypeVar

from google.protobuf import json_format
from google.protobuf.struct_pb2 import Struct

from patchclamp.v1 import artifact_pb2 as pb
from patchclamp.v1 import program_pb2
from patchclamp_server.artifacts.formats.base import Format
from patchclamp_server.artifacts.formats.registry import FORMATS
from patchclamp_server.artifacts.row_formats import ROW_FORMATS, RowFormat
from patchclamp_server.artifacts.types import ArtifactInfo, ArtifactKind, Tags
from patchclamp_server.artifacts.validation import check_tags
from patchclamp_server.errors import InvalidArgument
from patchclamp_server.interventions.field_checks import known
from patchclamp_server.rpc.codecs.program import SITE_NUMBERS
from patchclamp_server.rpc.codecs.times import timestamp

T = TypeVar("T")
MAX_DESCRIPTION_CHARACTERS = 10_000

KINDS: dict[int, ArtifactKind] = {pb.ArtifactKind.Value(f"ARTIFACT_KIND_{k.name}"): k for k in ArtifactKind}
KIND_NUMBERS: dict[ArtifactKind, "pb.ArtifactKind.ValueType"] = {
    k: pb.ArtifactKind.Value(f"ARTIFACT_KIND_{k.name}") for k in ArtifactKind
}
FORMAT_NAMES: dict[int, str] = {
    pb.ArtifactFormat.Value(f"ARTIFACT_FORMAT_{name.upper()}"): name for name in {**FORMATS, **ROW_FORMATS}
}


def decode_kind(number: int, field: str) -> ArtifactKind:
    return known(number, KINDS, field, pb.ArtifactKind.keys()[1:])


def decode_format(number: int, field: str) -> str:
    """Returns the name of a format; file_format and row_format say whether a kind has it."""
    return known(number, FORMAT_NAMES, field, pb.ArtifactFormat.keys()[1:])


def file_format(name: str, field: str) -> Format:
    """Returns a format of kinds that are read whole. InvalidArgument: it is of others alone."""
    return _of_kind(name, FORMATS, field)


def row_format(name: str, field: str) -> RowFormat:
    """Returns a format of kinds that are read by rows. InvalidArgument: it is of others alone."""
    return _of_kind(name, ROW_FORMATS, field)


def _of_kind(name: str, formats: Mapping[str, T], field: str) -> T:
    if name not in formats:
        raise InvalidArgument(field, f"{name} is no format of this kind; accepted: {', '.join(formats)}")
    return formats[name]


def decode_struct(struct: Struct, field: str) -> dict[str, Any]:
    """Returns the JSON object of a Struct. Raises InvalidArgument for NaN and Inf, which JSON lacks."""
    try:
        fields: dict[str, Any] = json_format.MessageToDict(struct)
    # Which of the two is raised depends on the implementation of protobuf.
    except (json_format.SerializeToJsonError, ValueError) as error:
        raise InvalidArgument(field, f"not a JSON object: {error}") from error
    return fields


def decode_tags(names: Iterable[str], replace: bool) -> Tags:
    """Returns the tags. Raises InvalidArgument as check_tags."""
    tags = Tags(tuple(names), replace)
    check_tags(tags.names)
    return tags


def decode_label(request: Any) -> tuple[str, Tags]:
    """Returns what a result is stored with: fields `description`, `tags` and `replace_tags` of the request."""
    return decode_description(request.description, "description"), decode_tags(request.tags, request.replace_tags)


def decode_description(text: str, field: str) -> str:
    if len(text) > MAX_DESCRIPTION_CHARACTERS:
        raise InvalidArgument(field, f"expected at most {MAX_DESCRIPTION_CHARACTERS} characters, got {len(text)}")
    return text


def encode_artifact(info: ArtifactInfo) -> pb.Artifact:
    return pb.Artifact(
        id=info.id,
        kind=KIND_NUMBERS[info.kind],
        tags=info.tags,
        model_fingerprint=info.model_fingerprint,
        site=SITE_NUMBERS[info.site] if info.site else program_pb2.SITE_UNSPECIFIED,
        layers=info.layers,
        width=info.width,
        size_bytes=info.size_bytes,
        created=timestamp(info.created),
        description=info.description,
        provenance=_encode_struct(info.provenance),
        evidence=_encode_struct(info.evidence),
        replaced_tags=info.replaced,
    )


def _encode_struct(fields: Mapping[str, Any]) -> Struct:
    return json_format.ParseDict(dict(fields), Struct())
