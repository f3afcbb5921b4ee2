"""Requests that were right, until some of their fields, at any depth, were changed, cleared or repeated.

`Random` is Python's, or the one of hypothesis (`st.randoms`), which can shrink what it drew.
"""

import math
from random import Random
from typing import Any

from google.protobuf.descriptor import FieldDescriptor
from google.protobuf.message import Message

_COUNTS = (0, 1, 2, 3, 9, 300, 2**31, 2**32 - 1)
_SIGNED = (0, 1, 2, 8, -1, 300, 2**31 - 1, -(2**31))
_NUMBERS = (0.0, 0.5, 1.0, -1.0, 1e-300, 1e38, math.nan, math.inf, -math.inf)
VALUES: dict[int, tuple[Any, ...]] = {
    FieldDescriptor.TYPE_UINT32: _COUNTS,
    FieldDescriptor.TYPE_UINT64: (0, 1, 2**63, 2**64 - 1),
    FieldDescriptor.TYPE_INT32: _SIGNED,
    FieldDescriptor.TYPE_INT64: (*_SIGNED, 2**62, -(2**63)),
    FieldDescriptor.TYPE_DOUBLE: (*_NUMBERS, 1e300),
    FieldDescriptor.TYPE_FLOAT: _NUMBERS,
    FieldDescriptor.TYPE_BOOL: (False, True),
    FieldDescriptor.TYPE_STRING: ("", " ", "a", "no-such-tag", "../up", "sha256:12", "\0", "é\u2028日本", "ab " * 200),
    FieldDescriptor.TYPE_BYTES: (b"", b"\0", b"\xff" * 4, b"\0\0\xc0\x7f" * 32, b"{}", b"x" * 1000),
}


def mutated(random: Random, request: Message, most: int = 2) -> Message:
    """A copy of `request` with 1 to `most` changes."""
    copy = type(request)()
    copy.CopyFrom(request)
    for _ in range(random.randint(1, most)):
        _change(random, copy)
    return copy


def corrupted(random: Random, data: bytes) -> bytes:
    """Bytes that were a message: some changed, cut off, doubled, or all others."""
    if not data or random.randint(0, 3) == 0:
        return random.randbytes(random.randint(1, 200))
    start, end = sorted(random.randint(0, len(data)) for _ in range(2))
    what = random.choice(("cut", "double", "flip"))
    if what == "cut":
        return data[:start] + data[end:]
    if what == "double":
        return data[:end] + data[start:]
    flipped = bytearray(data)
    for _ in range(random.randint(1, 8)):
        flipped[random.randrange(len(data))] = random.randrange(256)
    return bytes(flipped)


def _change(random: Random, message: Message) -> None:
    if not message.DESCRIPTOR.fields:
        return
    field = random.choice(list(message.DESCRIPTOR.fields))
    value = getattr(message, field.name)
    if field.is_repeated and field.message_type is not None and field.message_type.GetOptions().map_entry:
        _change_map(random, field.message_type.fields_by_name["value"], value)
    elif field.is_repeated:
        _change_list(random, field, value)
    elif field.type != FieldDescriptor.TYPE_MESSAGE:
        setattr(message, field.name, _scalar(random, field))
    elif random.randint(0, 4) == 0:
        message.ClearField(field.name)
    else:
        value.SetInParent()
        _change(random, value)


def _change_map(random: Random, field: FieldDescriptor, values: Any) -> None:
    """All maps of the contract are by names. `field` is that of their values."""
    name = random.choice([*values, *VALUES[FieldDescriptor.TYPE_STRING]])
    if random.randint(0, 2) == 0:
        values.clear()
    elif field.type == FieldDescriptor.TYPE_MESSAGE:
        _change(random, values[name])
    else:
        values[name] = _scalar(random, field)


def _change_list(random: Random, field: FieldDescriptor, values: Any) -> None:
    what = random.choice(("clear", "repeat", "change"))
    if what == "clear" or (not values and field.type == FieldDescriptor.TYPE_MESSAGE):
        del values[:]
    elif what == "repeat" and values:
        values.extend(list(values))
    elif field.type == FieldDescriptor.TYPE_MESSAGE:
        _change(random, random.choice(list(values)))
    else:
        values[:] = [_scalar(random, field) for _ in range(random.randint(1, 3))]


def _scalar(random: Random, field: FieldDescriptor) -> Any:
    if field.enum_type is not None:
        return random.choice([*field.enum_type.values_by_number, 99])
    return random.choice(VALUES[field.type])
