"""Kinds of JSON values. Each checks a value of a request, and is its JSON Schema: what is published is what holds."""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from patchclamp_http.errors import invalid

JsonSchema = dict[str, Any]
# (value, path) → value as it is used. Raises ApiError.
Check = Callable[[Any, str], Any]


@dataclass(frozen=True)
class Kind:
    schema: JsonSchema
    check: Check


def boolean() -> Kind:
    def check(value: Any, path: str) -> bool:
        if not isinstance(value, bool):
            raise invalid(path, f"expected true or false, got {_shown(value)}")
        return value

    return Kind({"type": "boolean"}, check)


def constant(wanted: bool | str, reason: str) -> Kind:
    """Takes one value alone, for fields whose other values are not served."""

    def check(value: Any, path: str) -> Any:
        if value is not wanted and value != wanted:
            raise invalid(path, f"{reason}, got {_shown(value)}")
        return value

    return Kind({"const": wanted}, check)


def integer(low: int, high: int) -> Kind:
    def check(value: Any, path: str) -> int:
        is_whole = isinstance(value, int) or (isinstance(value, float) and value.is_integer())
        if isinstance(value, bool) or not is_whole or not low <= value <= high:
            raise invalid(path, f"expected a whole number from {low} to {high}, got {_shown(value)}")
        return int(value)

    return Kind({"type": "integer", "minimum": low, "maximum": high}, check)


def number(low: float = -math.inf, high: float = math.inf, *, above: bool = False) -> Kind:
    """`above`: `low` itself is not accepted."""
    schema: JsonSchema = {"type": "number"}
    if low > -math.inf:
        schema["exclusiveMinimum" if above else "minimum"] = low
    if high < math.inf:
        schema["maximum"] = high

    def check(value: Any, path: str) -> float:
        is_number = isinstance(value, int | float) and not isinstance(value, bool)
        if not is_number or not low <= value <= high or (above and value == low):
            bounds = f" {'above' if above else 'from'} {low:g}" if low > -math.inf else ""
            bounds += f" to {high:g}" if high < math.inf else ""
            raise invalid(path, f"expected a number{bounds}, got {_shown(value)}")
        return float(value)

    return Kind(schema, check)


def string(*words: str) -> Kind:
    """Takes any text, or only `words`."""

    def check(value: Any, path: str) -> str:
        if not isinstance(value, str) or (words and value not in words):
            expected = "one of " + ", ".join(words) if words else "a string"
            raise invalid(path, f"expected {expected}, got {_shown(value)}")
        return value

    return Kind({"type": "string", "enum": list(words)} if words else {"type": "string"}, check)


def array(items: Kind, low: int = 0, high: int | None = None) -> Kind:
    schema: JsonSchema = {"type": "array", "items": items.schema, "minItems": low}
    if high is not None:
        schema["maxItems"] = high

    def check(value: Any, path: str) -> list[Any]:
        if not isinstance(value, list) or len(value) < low or (high is not None and len(value) > high):
            limits = f"{low} to {high}" if high is not None else f"at least {low}"
            raise invalid(path, f"expected an array of {limits} items, got {_shown(value)}")
        return [items.check(item, f"{path}[{i}]") for i, item in enumerate(value)]

    return Kind(schema, check)


def mapping(keys: str, values: Kind) -> Kind:
    """Takes an object whose keys are decimal numbers. `keys` is the pattern that is published."""

    def check(value: Any, path: str) -> dict[int, Any]:
        if not isinstance(value, dict):
            raise invalid(path, f"expected an object, got {_shown(value)}")
        for key in value:
            if not (key.isascii() and key.isdecimal()) or int(key) >= 2**32:
                raise invalid(path, f"expected keys that are token ids, got {key!r}")
        return {int(key): values.check(item, f"{path}.{key}") for key, item in value.items()}

    schema = {"type": "object", "propertyNames": {"pattern": keys}, "additionalProperties": values.schema}
    return Kind(schema, check)


def obj(fields: Mapping[str, Kind], *, required: tuple[str, ...] = ()) -> Kind:
    """Takes an object of these fields; null is as good as none, of those that are not required."""
    properties = {name: kind.schema if name in required else nullable(kind.schema) for name, kind in fields.items()}
    schema: JsonSchema = {"type": "object", "properties": properties, "additionalProperties": False}
    if required:
        schema["required"] = list(required)

    def check(value: Any, path: str) -> dict[str, Any]:
        if not isinstance(value, dict):
            raise invalid(path, f"expected an object, got {_shown(value)}")
        for name in value:
            if name not in fields:
                raise invalid(below(path, name), f"is no field here; accepted: {', '.join(fields)}")
        for name in required:
            if value.get(name) is None:
                raise invalid(below(path, name), "expected, and not given")
        return {name: fields[name].check(item, below(path, name)) for name, item in value.items() if item is not None}

    return Kind(schema, check)


def either(*kinds: Kind, told: str) -> Kind:
    """Takes what one of the kinds takes, by the JSON type of each, which differ. `told` says what is expected."""

    def check(value: Any, path: str) -> Any:
        for kind in kinds:
            if _is_of(value, kind.schema):
                return kind.check(value, path)
        raise invalid(path, f"expected {told}, got {_shown(value)}")

    return Kind({"anyOf": [kind.schema for kind in kinds]}, check)


def anything(schema: JsonSchema | None = None) -> Kind:
    """Takes any value, which is checked elsewhere by `schema`, or has no effect."""
    return Kind(schema or {}, lambda value, path: value)


def nullable(schema: JsonSchema) -> JsonSchema:
    return {"anyOf": [schema, {"type": "null"}]} if schema else schema


def below(path: str, name: str) -> str:
    return f"{path}.{name}" if path else name


_TYPES: Mapping[str, type | tuple[type, ...]] = {
    "boolean": bool,
    "integer": (int, float),
    "number": (int, float),
    "string": str,
    "array": list,
    "object": dict,
}


def _is_of(value: Any, schema: JsonSchema) -> bool:
    """Whether a value has the type of a schema, and an array items of the type of its items."""
    wanted = _TYPES[schema["type"]]
    if isinstance(value, bool) and wanted is not bool:
        return False
    if not isinstance(value, wanted):
        return False
    return (
        not isinstance(value, list) or not value or "type" not in schema["items"] or _is_of(value[0], schema["items"])
    )


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:60]}…"
