"""Checks that every message needs: each raises InvalidArgument with the path of the field."""

import math
from collections.abc import Hashable, Iterable, Sequence
from typing import TypeVar

from google.protobuf.message import Message

from patchclamp_server.errors import InvalidArgument, below

E = TypeVar("E")
H = TypeVar("H", bound=Hashable)

# A negative number sent for an unsigned field arrives as a value above this, whatever the client's language.
LARGEST_COUNT = 2**31 - 1


def finite(value: float, field: str, *, low: float = -math.inf, high: float = math.inf) -> float:
    """Returns `value`, which must be a number in [low, high]."""
    if not math.isfinite(value):
        raise InvalidArgument(field, f"expected a finite number, got {value}")
    if not low <= value <= high:
        raise InvalidArgument(field, f"expected a number {_interval(low, high)}, got {value:g}")
    return value


def _interval(low: float, high: float) -> str:
    if math.isinf(high):
        return f"of at least {low:g}"
    if math.isinf(low):
        return f"of at most {high:g}"
    return f"from {low:g} to {high:g}"


def count(value: int, field: str, *, low: int = 0, high: int = LARGEST_COUNT) -> int:
    """Returns `value`, which must lie in [low, high]; a negative one sent on the wire arrives as a huge one."""
    if not low <= value <= high:
        raise InvalidArgument(field, f"expected a whole number from {low} to {high}, got {value}")
    return value


def distinct(values: Sequence[H], field: str) -> tuple[H, ...]:
    """Returns `values`, none of which may come twice."""
    seen: dict[H, int] = {}
    for i, value in enumerate(values):
        if value in seen:
            raise InvalidArgument(f"{field}[{i}]", f"{value} is already given at index {seen[value]}")
        seen[value] = i
    return tuple(values)


def distinct_names(names: Iterable[str], field: str) -> None:
    """Checks that names that are given are unique; `field` is the repeated field whose elements have a `name`."""
    seen: dict[str, int] = {}
    for i, name in enumerate(names):
        if name and name in seen:
            raise InvalidArgument(f"{field}[{i}].name", f"{name!r} is already the name of {field}[{seen[name]}]")
        seen[name] = i


def known(value: int, table: dict[int, E], field: str, names: Iterable[str]) -> E:
    """Returns the member of `table` for an enum number; refuses UNSPECIFIED and numbers this server does not know."""
    member = table.get(value)
    if member is None:
        what = "it is not set" if value == 0 else f"{value} is not one of them"
        raise InvalidArgument(field, f"expected one of {', '.join(names)}; {what}")
    return member


def chosen(message: Message, oneof: str, field: str) -> str:
    """Returns the name of the field of `oneof` that is set; `field` is the path of the message."""
    name: str | None = message.WhichOneof(oneof)
    if name is None:
        options = [f.name for f in message.DESCRIPTOR.oneofs_by_name[oneof].fields]
        raise InvalidArgument(below(field, oneof), f"expected one of {', '.join(options)}")
    return name


def required(message: Message, name: str, field: str) -> None:
    """Checks that the submessage `name` is present; `field` is the path of the message that holds it."""
    if not message.HasField(name):
        raise InvalidArgument(below(field, name), "required")


def alone(message: Message, name: str, others: Iterable[str], field: str) -> None:
    """Checks that none of the submessages `others` is present beside the field `name`, which is set."""
    for other in others:
        if message.HasField(other):
            raise InvalidArgument(below(field, other), f"{name} is given as well; expected one of both")
