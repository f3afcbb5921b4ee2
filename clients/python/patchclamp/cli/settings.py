"""Settings in one argument: ``keep_ratio=.5,bits=3,exact_gate``."""

import argparse
from collections.abc import Callable, Mapping
from typing import Any

Parse = Callable[[str], Any]


def settings(text: str, accepted: Mapping[str, Parse | None]) -> dict[str, Any]:
    """Returns {name: parsed value}. A name whose parser is None is a flag: it stands alone, and is True."""
    given: dict[str, Any] = {}
    for part in filter(None, text.split(",")):
        name, equals, value = part.partition("=")
        if name not in accepted:
            raise argparse.ArgumentTypeError(f"{name!r} is unknown; accepted: {', '.join(accepted)}")
        if name in given:
            raise argparse.ArgumentTypeError(f"{name!r} is given twice")
        parse = accepted[name]
        if (parse is None) == bool(equals):
            expected = f"{name} alone" if parse is None else f"{name}=VALUE"
            raise argparse.ArgumentTypeError(f"{part!r}: expected {expected}")
        given[name] = True if parse is None else _parsed(name, value, parse)
    return given


def _parsed(name: str, value: str, parse: Parse) -> Any:
    try:
        return parse(value)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{name}={value!r} is not {_NAMES.get(parse, 'what is expected')}") from None


_NAMES: Mapping[Parse, str] = {int: "a whole number", float: "a number"}
