"""Values that a user gave → fields of a message. What a field cannot hold is refused by its name."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, ParamSpec, SupportsFloat, SupportsIndex, TypeVar, cast

from google.protobuf.descriptor import FieldDescriptor
from google.protobuf.message import Message

ValueT = TypeVar("ValueT")
MessageT = TypeVar("MessageT", bound=Message)
P = ParamSpec("P")

_INTEGERS: Mapping[int, tuple[int, int]] = {
    FieldDescriptor.TYPE_INT32: (-(2**31), 2**31 - 1),
    FieldDescriptor.TYPE_INT64: (-(2**63), 2**63 - 1),
    # The server takes no more than this, because a negative number that another client wraps around is above it.
    FieldDescriptor.TYPE_UINT32: (0, 2**31 - 1),
    FieldDescriptor.TYPE_UINT64: (0, 2**64 - 1),
}
_OTHERS: Mapping[int, str] = {
    FieldDescriptor.TYPE_DOUBLE: "a number",
    FieldDescriptor.TYPE_FLOAT: "a number",
    FieldDescriptor.TYPE_BOOL: "True or False",
    FieldDescriptor.TYPE_STRING: "a str",
    FieldDescriptor.TYPE_BYTES: "bytes",
}
_LONGEST_SHOWN = 60


def build(kind: Callable[P, MessageT], /, *args: P.args, **fields: P.kwargs) -> MessageT:
    """Returns ``kind(**fields)``; None is unset. TypeError or ValueError names the field and what it can hold.

    One text is refused where several are expected: it would be taken apart into characters.
    """
    return build_as({}, kind, *args, **fields)


def build_as(names: Mapping[str, str], kind: Callable[P, MessageT], /, *args: P.args, **fields: P.kwargs) -> MessageT:
    """Does what build does. names: what the user calls a field where that is not its name in the contract."""
    message_type = cast(type[MessageT], kind)
    descriptors = _descriptors(message_type)
    given: dict[str, Any] = {}
    for name, value in fields.items():
        given[name] = value
        if value is not None and _is_repeated(descriptors[name]):
            # Looked at twice when something is wrong.
            given[name] = several(value, names.get(name, name), _what(descriptors[name]))
        elif _is_map(descriptors[name]) and not isinstance(value, Mapping | None):
            raise TypeError(f"{names.get(name, name)}: expected {_what(descriptors[name])}, got {shown(value)}")
    try:
        return message_type(**given)
    except (TypeError, ValueError, OverflowError):
        _name_the_fault(message_type, given, names)
        raise


def several(values: object, field: str, what: str) -> list[Any]:
    """Returns the elements of an iterable. Raises TypeError for anything else, one text included."""
    if isinstance(values, str | bytes) or not isinstance(values, Iterable):
        raise TypeError(f"{field}: expected several, each {what}, got {shown(values)}")
    return list(values)


def one_or_several(values: object, field: str, what: str) -> list[Any]:
    """Does what several does, but takes one number for a list of one."""
    if isinstance(values, SupportsIndex | SupportsFloat) and not isinstance(values, Iterable):
        return [values]
    return several(values, field, what)


def one_text_or_several(texts: str | Iterable[str]) -> Iterable[str]:
    """Returns the texts; one alone will do."""
    return [texts] if isinstance(texts, str) else texts


def instances(values: object, kind: type[ValueT], field: str, what: str) -> list[ValueT]:
    """Returns the elements of an iterable, each of which must be a `kind`. TypeError names the one that is not."""
    return [instance(value, kind, f"{field}[{i}]", what) for i, value in enumerate(several(values, field, what))]


def instance(value: object, kind: type[ValueT], field: str, what: str) -> ValueT:
    """Returns the value, which must be a `kind`: TypeError says what is expected."""
    if not isinstance(value, kind):
        raise TypeError(f"{field}: expected {what}, got {shown(value)}")
    return value


def shown(value: object) -> str:
    """Returns a value as an error shows it: on one line, and not longer than people read."""
    if isinstance(value, Message) or callable(value):
        return f"{'a' if isinstance(value, Message) else 'the'} {_name_of(value)}"
    text = " ".join(repr(value).split())
    return text if len(text) <= _LONGEST_SHOWN else f"{text[: _LONGEST_SHOWN - 3]}..."


def _name_of(value: object) -> str:
    if isinstance(value, Message):
        return str(value.DESCRIPTOR.name)
    return f"function {getattr(value, '__name__', type(value).__name__)}"


def _name_the_fault(kind: type[Message], fields: Mapping[str, Any], names: Mapping[str, str]) -> None:
    """Raises for the field, or the element of a field, that its message does not take."""
    for name, value in fields.items():
        descriptor = _descriptors(kind)[name]
        for path, part in _parts(descriptor, names.get(name, name), value):
            try:
                kind(**{name: [part] if _is_repeated(descriptor) else part})
            except TypeError:
                raise TypeError(f"{path}: expected {_what(descriptor)}, got {shown(part)}") from None
            except (ValueError, OverflowError):
                raise ValueError(f"{path}: expected {_range(descriptor)}, got {shown(part)}") from None


def _parts(descriptor: FieldDescriptor, path: str, value: Any) -> Iterator[tuple[str, Any]]:
    if value is not None and _is_repeated(descriptor):
        yield from ((f"{path}[{i}]", element) for i, element in enumerate(value))
    else:
        yield path, value


def _descriptors(kind: type[Message]) -> Mapping[str, FieldDescriptor]:
    return cast(Mapping[str, FieldDescriptor], kind.DESCRIPTOR.fields_by_name)


def _is_repeated(descriptor: FieldDescriptor) -> bool:
    return bool(descriptor.is_repeated) and not _is_map(descriptor)


def _is_map(descriptor: FieldDescriptor) -> bool:
    entry = descriptor.message_type
    return entry is not None and bool(entry.GetOptions().map_entry)


def _what(descriptor: FieldDescriptor) -> str:
    if descriptor.message_type is not None:
        if _is_map(descriptor):
            key, value = (descriptor.message_type.fields_by_name[name] for name in ("key", "value"))
            return f"a dict, each key {_what(key)} and each value {_what(value)}"
        name = descriptor.message_type.name
        return f"{'an' if name[0] in 'AEIO' else 'a'} {name}"
    return _OTHERS.get(descriptor.type, "an int")


def _range(descriptor: FieldDescriptor) -> str:
    if descriptor.type in _INTEGERS:
        low, high = _INTEGERS[descriptor.type]
        return f"an int from {low} to {high}"
    if descriptor.type == FieldDescriptor.TYPE_STRING:
        return "a str that UTF-8 can write"
    return _what(descriptor)
