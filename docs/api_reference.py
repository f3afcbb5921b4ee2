"""Writes the reference of the gRPC API from the comments of the protos."""

import tempfile
from collections.abc import Iterator, Sequence
from importlib.resources import files
from pathlib import Path

from google.protobuf.descriptor_pb2 import (
    DescriptorProto,
    EnumDescriptorProto,
    FieldDescriptorProto,
    FileDescriptorProto,
    FileDescriptorSet,
)
from grpc_tools import protoc

# Numbers of the fields of descriptor.proto, of which the paths of comments are made.
_MESSAGES, _ENUMS, _SERVICES = 4, 5, 6
_METHODS = 2
_FIELDS, _NESTED, _NESTED_ENUMS, _ONEOFS = 2, 3, 4, 8
_VALUES = 2

_Comments = dict[tuple[int, ...], str]


def reference(protos: Path) -> str:
    """One page of Markdown: services first, then the messages of each file. Raises RuntimeError where protoc fails."""
    described = _described(protos)
    lines = [
        "# gRPC API",
        "",
        "Made of `proto/patchclamp/v1/`. Errors are a status with `google.rpc` details: `INVALID_ARGUMENT` carries the",
        "path of each field at fault.",
    ]
    for file in described:
        comments = _comments(file)
        for i, service in enumerate(file.service):
            lines += ["", f"## {service.name}", "", comments.get((_SERVICES, i), "")]
            for j, method in enumerate(service.method):
                asked, told = (
                    f"{'stream ' if streams else ''}[{_name(kind)}](#{_anchor(kind)})"
                    for kind, streams in (
                        (method.input_type, method.client_streaming),
                        (method.output_type, method.server_streaming),
                    )
                )
                lines += ["", f"### {service.name}.{method.name}", "", f"{asked} → {told}", ""]
                lines.append(comments.get((_SERVICES, i, _METHODS, j), ""))
    for file in described:
        comments = _comments(file)
        lines += ["", f"## {Path(file.name).name}", "", comments.get((2,), "")]
        for i, message in enumerate(file.message_type):
            lines += _message(message, (_MESSAGES, i), "", comments)
        for i, enum in enumerate(file.enum_type):
            lines += _enum(enum, (_ENUMS, i), "", comments)
    return "\n".join(lines) + "\n"


def _described(protos: Path) -> Sequence[FileDescriptorProto]:
    names = sorted(str(path.relative_to(protos)) for path in protos.rglob("*.proto"))
    with tempfile.TemporaryDirectory() as scratch:
        out = Path(scratch) / "set"
        status = protoc.main(
            [
                "protoc",
                f"-I{protos}",
                f"-I{files('grpc_tools') / '_proto'}",
                "--include_source_info",
                f"--descriptor_set_out={out}",
                *names,
            ]
        )
        if status:
            raise RuntimeError(f"protoc ended with status {status}")
        return FileDescriptorSet.FromString(out.read_bytes()).file


def _comments(file: FileDescriptorProto) -> _Comments:
    """The comment of each thing by its path: those before it, and at the end of its line."""
    found = {}
    for location in file.source_code_info.location:
        text = f"{location.leading_comments}{location.trailing_comments}".strip()
        if text:
            found[tuple(location.path)] = "\n".join(line.removeprefix(" ") for line in text.splitlines())
    return found


def _message(message: DescriptorProto, path: tuple[int, ...], outer: str, comments: _Comments) -> Iterator[str]:
    if message.options.map_entry:
        return
    name = f"{outer}{message.name}"
    yield from ("", f"### {name}", "", comments.get(path, ""), "")
    if message.field:
        yield from ("| field | type | meaning |", "|---|---|---|")
        entries = {nested.name: nested for nested in message.nested_type if nested.options.map_entry}
        for i, field in enumerate(message.field):
            meaning = _cell(comments.get((*path, _FIELDS, i), ""))
            yield f"| `{field.name}` | {_type(message, field, entries)} | {meaning} |"
    for i, nested in enumerate(message.nested_type):
        yield from _message(nested, (*path, _NESTED, i), f"{name}.", comments)
    for i, enum in enumerate(message.enum_type):
        yield from _enum(enum, (*path, _NESTED_ENUMS, i), f"{name}.", comments)


def _enum(enum: EnumDescriptorProto, path: tuple[int, ...], outer: str, comments: _Comments) -> Iterator[str]:
    yield from ("", f"### {outer}{enum.name}", "", comments.get(path, ""), "", "| value | meaning |", "|---|---|")
    for i, value in enumerate(enum.value):
        yield f"| `{value.name}` = {value.number} | {_cell(comments.get((*path, _VALUES, i), ''))} |"


def _type(message: DescriptorProto, field: FieldDescriptorProto, entries: dict[str, DescriptorProto]) -> str:
    entry = entries.get(_name(field.type_name).rpartition(".")[2])
    if entry is not None:
        return f"map of {_plain(entry.field[0])} to {_plain(entry.field[1])}"
    words = [_plain(field)]
    if field.label == FieldDescriptorProto.LABEL_REPEATED:
        words.insert(0, "repeated")
    elif field.proto3_optional:
        words.insert(0, "optional")
    elif field.HasField("oneof_index"):
        words.append(f"(one of `{message.oneof_decl[field.oneof_index].name}`)")
    if field.options.deprecated:
        words.append("(deprecated)")
    return " ".join(words)


def _plain(field: FieldDescriptorProto) -> str:
    if field.type_name.startswith(".patchclamp."):
        return f"[{_name(field.type_name)}](#{_anchor(field.type_name)})"
    if field.type_name:
        return f"`{field.type_name.lstrip('.')}`"
    return FieldDescriptorProto.Type.Name(field.type).removeprefix("TYPE_").lower()


def _name(full: str) -> str:
    """Without the package."""
    return full.removeprefix(".patchclamp.v1.")


def _anchor(full: str) -> str:
    return _name(full).replace(".", "").lower()


def _cell(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|")
