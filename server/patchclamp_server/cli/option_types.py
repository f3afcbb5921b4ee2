"""What the values of options may be. Each type refuses a value with what would be accepted."""

import argparse
import importlib.util
import os
import re
from collections.abc import Callable
from typing import Any
from urllib.parse import urlsplit

from patchclamp.extras import install_line
from patchclamp_server.addresses import Address
from patchclamp_server.sizes import parse_size

# Without a protocol for traces, the one for all signals holds.
OTLP_PROTOCOLS = ("OTEL_EXPORTER_OTLP_TRACES_PROTOCOL", "OTEL_EXPORTER_OTLP_PROTOCOL")
# A name is a label of Prometheus; a watch and a reference are ids or tags.
WATCH_AT_START = re.compile(r"([^=@]+)=([^=@]+)(?:@([^=@]+))?")


def positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"expected at least 1, got {value}")
    return value


def size(text: str) -> int:
    try:
        return parse_size(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def address(text: str) -> str:
    try:
        Address.parse(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None
    return text


def tcp_address(text: str) -> str:
    try:
        address = Address.parse(text)
    except ValueError:
        address = Address(path=text)
    if address.path:
        raise argparse.ArgumentTypeError(f"expected host:port or [IPv6 address]:port, got {text!r}")
    return text


def http_address(text: str) -> str:
    """Refuses HTTP before the model is loaded where it could not be served."""
    missing = [name for name in ("connectrpc", "orjson", "starlette", "uvicorn", "uvloop") if not _has(name)]
    if missing:
        raise argparse.ArgumentTypeError(f"{missing[0]} is not installed: {install_line('http')}")
    return tcp_address(text)


def words(text: str) -> tuple[str, ...]:
    """Parses "a,b"."""
    return tuple(filter(None, (word.strip() for word in text.split(","))))


def seconds(text: str) -> float:
    value = float(text)
    if not 0.0 <= value < float("inf"):
        raise argparse.ArgumentTypeError(f"expected a number of seconds, got {text}")
    return value


def interval(text: str) -> float:
    value = seconds(text)
    if value < 0.1:
        raise argparse.ArgumentTypeError(f"expected at least 0.1 seconds, got {text}")
    return value


class Together(argparse.Action):
    """Joins the values of all its uses; those of the variable count only where it is not used at all."""

    def __call__(
        self, parser: argparse.ArgumentParser, namespace: argparse.Namespace, values: Any, option: str | None = None
    ) -> None:
        # Until the parser is done, a default is still text.
        before = getattr(namespace, self.dest)
        setattr(namespace, self.dest, (*before, *values) if isinstance(before, tuple) else values)


def watches(text: str) -> tuple[tuple[str, str, str], ...]:
    """Parses "joy=joyful-watch@joyful-normal,toxic=sha256:..." as (name, watch, reference)."""
    found = []
    for part in filter(None, text.split(",")):
        match = WATCH_AT_START.fullmatch(part)
        if match is None:
            raise argparse.ArgumentTypeError(f"expected NAME=WATCH or NAME=WATCH@REFERENCE, got {part!r}")
        found.append((match[1], match[2], match[3] or ""))
    return tuple(found)


def checkpoints(text: str) -> tuple[tuple[str, str], ...]:
    """Parses "tuned=DIRECTORY,older=FILE.gguf" as (name, path). What is not there is refused before anything starts."""
    found = []
    for part in filter(None, text.split(",")):
        name, _, path = part.partition("=")
        if not name or not path:
            raise argparse.ArgumentTypeError(f"expected NAME=PATH, got {part!r}")
        if not os.path.exists(path):
            raise argparse.ArgumentTypeError(f"{part!r}: there is no such directory or .gguf file")
        found.append((name, path))
    return tuple(found)


def tracing(text: str) -> str:
    """Refuses tracing before the model is loaded where it could not work."""
    choice = one_of("off", "otlp")(text)
    if choice == "otlp":
        missing = [name for name in ("opentelemetry.sdk", "opentelemetry.exporter.otlp.proto.grpc") if not _has(name)]
        if missing:
            raise argparse.ArgumentTypeError(f"{missing[0]} is not installed: {install_line('otel')}")
        protocol = next((os.environ[name] for name in OTLP_PROTOCOLS if os.environ.get(name)), "grpc")
        if protocol != "grpc":
            raise argparse.ArgumentTypeError(f"the environment asks for OTLP by {protocol}; only grpc is spoken here")
    return choice


def _has(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:  # this is the package around it
        return False


def endpoint(text: str) -> str:
    url = urlsplit(text)
    if url.scheme not in ("http", "https") or not url.hostname or url.path.strip("/"):
        raise argparse.ArgumentTypeError(f"expected http://host:port or https://host:port, got {text!r}")
    return text


def one_of(*choices: str) -> Callable[[str], str]:
    """Checks a choice as a type, because argparse does not check `choices` for a default."""

    def check(text: str) -> str:
        if text not in choices:
            raise argparse.ArgumentTypeError(f"expected one of {', '.join(choices)}, got {text!r}")
        return text

    return check


def slowdown(text: str) -> float:
    value = float(text)
    if not 1.0 < value < float("inf"):
        raise argparse.ArgumentTypeError(f"expected a number above 1, got {text}")
    return value


def watch_count(text: str) -> int:
    """Bounds watches, because the bits of a number mark their rows."""
    value = positive(text)
    if value > 63:
        raise argparse.ArgumentTypeError(f"expected at most 63, got {value}")
    return value
