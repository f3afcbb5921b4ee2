"""The base of the results: what one reads of its message, and how it is written as JSON."""

from collections.abc import Callable
from dataclasses import asdict, dataclass, fields
from functools import cache, partial
from operator import attrgetter
from types import NoneType
from typing import Any, Self, get_args, get_type_hints

from google.protobuf import json_format
from google.protobuf.descriptor import FieldDescriptor

from patchclamp.names import name_of

Read = Callable[[Any], Any]
SHOWN = 5


@dataclass(frozen=True)
class Record:
    """Holds plain values: a frozen dataclass whose fields have the names of the fields of a message."""

    def __init_subclass__(cls, **options: Any) -> None:
        super().__init_subclass__(**options)
        # A dataclass makes one of its own where its class has none: that of a set of neurons would fill the screen.
        cls.__repr__ = Record.__repr__  # type: ignore[method-assign]

    def __repr__(self) -> str:
        """Returns what a dataclass would, with the first SHOWN elements of what is repeated."""
        shown = ", ".join(f"{each.name}={_shown(getattr(self, each.name))}" for each in fields(self))
        return f"{type(self).__name__}({shown})"

    @classmethod
    def from_proto(cls, message: Any, **given: Any) -> Self:
        """Returns the record of a message, and of the fields that are given in place of the message's own.

        An enum value becomes its name: "" when it is unspecified, and its number when this client does not know it. A
        time becomes RFC 3339 text, a Struct a dict, what is repeated a tuple. A field that may be None is None where
        the message does not have it.
        """
        kind: Any = cls  # hashable, as every class is, though mypy doubts it
        readers = _readers(kind, message.DESCRIPTOR, frozenset(given))
        return cls(**{name: read(message) for name, read in readers}, **given)

    def to_dict(self) -> dict[str, Any]:
        """Returns nested dicts, lists, strings and numbers."""
        return asdict(self)


@cache
def _readers(record: Any, message: Any, given: frozenset[str]) -> tuple[tuple[str, Read], ...]:
    """Returns the name of each field that is not given, and what reads it. KeyError for one that no message has."""
    types = get_type_hints(record)
    names = [each.name for each in fields(record) if each.name not in given]
    return tuple((name, _reader(message.fields_by_name[name], types[name])) for name in names)


def _reader(field: FieldDescriptor, kind: Any) -> Read:
    """Returns what reads a field of a message as a value of this type."""
    name, alternatives = field.name, get_args(kind)
    if field.message_type is not None and field.message_type.GetOptions().map_entry:
        # A message gives its entries in another order each time.
        return lambda message: dict(sorted(getattr(message, name).items()))
    if field.is_repeated:
        convert = _converter(field, alternatives[0])
        return lambda message: tuple(map(convert, getattr(message, name)))
    if NoneType in alternatives:
        convert = _converter(field, next(each for each in alternatives if each is not NoneType))
        return lambda message: convert(getattr(message, name)) if message.HasField(name) else None
    convert = _converter(field, kind)
    # Most fields are numbers and texts, and tokens come by the thousand.
    return attrgetter(name) if convert is _unchanged else lambda message: convert(getattr(message, name))


def _converter(field: FieldDescriptor, kind: Any) -> Read:
    """Returns what makes a value of this type of one value of a field."""
    if field.enum_type is not None:
        return partial(name_of, field.enum_type)
    if field.message_type is None:
        return _unchanged
    match field.message_type.full_name:
        case "google.protobuf.Timestamp":
            return lambda value: value.ToJsonString()
        case "google.protobuf.Struct":
            return json_format.MessageToDict
    if issubclass(kind, Record):
        read: Read = kind.from_proto
        return read
    # A named tuple, such as Head.
    return lambda value: kind(*(getattr(value, each) for each in kind._fields))


def _unchanged(value: Any) -> Any:
    return value


def _shown(value: object) -> str:
    if not isinstance(value, (tuple, list)) or len(value) <= SHOWN:
        return repr(value)
    more = f"... {len(value) - SHOWN:,} more"
    opening, closing = "()" if isinstance(value, tuple) else "[]"
    return f"{opening}{', '.join(map(repr, value[:SHOWN]))}, {more}{closing}"
