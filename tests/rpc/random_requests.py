"""Requests that were right, until one or two of their fields, at any depth, were changed, cleared or repeated."""

import math
from typing import Any

from google.protobuf.descriptor import FieldDescriptor
from google.protobuf.message import Message
from hypothesis import strategies as st

_COUNTS = (0, 1, 2, 3, 9, 300, 2**31, 2**32 - 1)
VALUES: dict[int, tuple[Any, ...]] = {
    FieldDescriptor.TYPE_UINT32: _COUNTS,
    FieldDescriptor.TYPE_UINT64: (0, 1, 2**63, 2**64 - 1),
    FieldDescriptor.TYPE_DOUBLE: (0.0, 0.5, 1.0, -1.0, 1e-300, 1e38, 1e300, math.nan, math.inf, -math.inf),
    FieldDescriptor.TYPE_BOOL: (False, True),
    FieldDescriptor.TYPE_STRING: ("", " ", "a", "no-such-tag", "../up", "sha256:12", "\0", "é\u2028日本", "ab " * 200),
}


def mutated(draw: st.DrawFn, request: Message) -> Message:
    """A copy of `request` with one change or two."""
    copy = type(request)()
    copy.CopyFrom(request)
    for _ in range(draw(st.integers(1, 2))):
        _change(draw, copy)
    return copy


def _change(draw: st.DrawFn, message: Message) -> None:
    field = draw(st.sampled_from(list(message.DESCRIPTOR.fields)))
    value = getattr(message, field.name)
    if field.is_repeated:
        _change_list(draw, field, value)
    elif field.type != FieldDescriptor.TYPE_MESSAGE:
        setattr(message, field.name, draw(_scalars(field)))
    elif draw(st.integers(0, 4)) == 0:
        message.ClearField(field.name)
    else:
        value.SetInParent()
        if field.message_type.fields:
            _change(draw, value)


def _change_list(draw: st.DrawFn, field: FieldDescriptor, values: Any) -> None:
    what = draw(st.sampled_from(("clear", "repeat", "change")))
    if what == "clear" or (not values and field.type == FieldDescriptor.TYPE_MESSAGE):
        del values[:]
    elif what == "repeat" and values:
        values.extend(list(values))
    elif field.type == FieldDescriptor.TYPE_MESSAGE:
        _change(draw, draw(st.sampled_from(list(values))))
    else:
        values[:] = draw(st.lists(_scalars(field), min_size=1, max_size=3))


def _scalars(field: FieldDescriptor) -> st.SearchStrategy[Any]:
    if field.enum_type is not None:
        return st.sampled_from([*field.enum_type.values_by_number, 99])
    return st.sampled_from(VALUES[field.type])
