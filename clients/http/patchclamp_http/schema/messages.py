"""Messages of the contract as JSON Schema: their JSON as protobuf has it, by the names of fields in camelCase.

Reading takes the names of the contract (`max_tokens`) as well as those here (`maxTokens`).
"""

from collections.abc import Iterable
from typing import Any

from google.protobuf.descriptor import Descriptor, EnumDescriptor, FieldDescriptor

JsonSchema = dict[str, Any]

_NOT_FINITE = {"type": "string", "enum": ["NaN", "Infinity", "-Infinity"]}
# JSON's numbers are doubles: 64 bits are written as text, and read as either.
_LARGE = {"anyOf": [{"type": "integer"}, {"type": "string", "pattern": "^-?[0-9]+$"}]}
_SCALARS: dict[int, JsonSchema] = {
    FieldDescriptor.CPPTYPE_BOOL: {"type": "boolean"},
    FieldDescriptor.CPPTYPE_INT32: {"type": "integer", "minimum": -(2**31), "maximum": 2**31 - 1},
    FieldDescriptor.CPPTYPE_UINT32: {"type": "integer", "minimum": 0, "maximum": 2**32 - 1},
    FieldDescriptor.CPPTYPE_INT64: _LARGE,
    FieldDescriptor.CPPTYPE_UINT64: _LARGE,
    FieldDescriptor.CPPTYPE_FLOAT: {"anyOf": [{"type": "number"}, _NOT_FINITE]},
    FieldDescriptor.CPPTYPE_DOUBLE: {"anyOf": [{"type": "number"}, _NOT_FINITE]},
}
# Those that have a JSON of their own.
_WELL_KNOWN: dict[str, JsonSchema] = {
    "google.protobuf.Timestamp": {"type": "string", "format": "date-time"},
    "google.protobuf.Duration": {"type": "string", "pattern": "^-?[0-9]+([.][0-9]+)?s$"},
    "google.protobuf.Struct": {"type": "object"},
}


def reference(message: Descriptor) -> JsonSchema:
    return _WELL_KNOWN.get(message.full_name) or {"$ref": f"#/components/schemas/{message.full_name}"}


def schemas(messages: Iterable[Descriptor]) -> dict[str, JsonSchema]:
    """Returns those of the messages, and of all that are in them, by full name."""
    found: dict[str, JsonSchema] = {}
    waiting = list(messages)
    while waiting:
        message = waiting.pop()
        if message.full_name in found or message.full_name in _WELL_KNOWN:
            continue
        found[message.full_name] = _message(message)
        waiting += [field.message_type for field in message.fields if field.message_type is not None]
    # The entries of maps are no messages to whoever reads them.
    return {name: schema for name, schema in sorted(found.items()) if not name.endswith("Entry")}


def _message(message: Descriptor) -> JsonSchema:
    properties = {field.json_name: _field(field) for field in message.fields}
    schema: JsonSchema = {"type": "object", "properties": properties, "additionalProperties": False}
    groups = [
        ", ".join(field.json_name for field in group.fields)
        for group in message.oneofs
        if not group.name.startswith("_")
    ]
    if groups:
        schema["description"] = "At most one of each: " + "; ".join(groups)
    return schema


def _field(field: FieldDescriptor) -> JsonSchema:
    kind = field.message_type
    if kind is not None and kind.GetOptions().map_entry:
        return {"type": "object", "additionalProperties": _value(kind.fields_by_name["value"])}
    if field.is_repeated:
        return {"type": "array", "items": _value(field)}
    return _value(field)


def _value(field: FieldDescriptor) -> JsonSchema:
    if field.message_type is not None:
        return reference(field.message_type)
    if field.enum_type is not None:
        return _enum(field.enum_type)
    if field.type == FieldDescriptor.TYPE_BYTES:
        return {"type": "string", "contentEncoding": "base64"}
    return _SCALARS.get(field.cpp_type, {"type": "string"})


def _enum(enum: EnumDescriptor) -> JsonSchema:
    return {"type": "string", "enum": [value.name for value in enum.values]}
