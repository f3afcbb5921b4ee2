"""The commands `patchclamp serve` and `patchclamp pull` import nothing heavy before the threads are configured."""

import argparse
import asyncio
import atexit
import importlib.util
import json
import logging
import os
import re
import shutil
import sys
import tempfile
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from patchclamp.extras import install_line
from patchclamp_server.addresses import Address
from patchclamp_server.threads import configure_threads

if TYPE_CHECKING:
    from patchclamp_server.rpc.config import ServerConfig

LOG_FORMAT = "%(asctime)s %(levelname)s %(name)s: %(message)s"
TRACED_LOG_FORMAT = "%(asctime)s %(levelname)s %(name)s trace_id=%(trace_id)s: %(message)s"
# Without a protocol for traces, the one for all signals holds.
OTLP_PROTOCOLS = ("OTEL_EXPORTER_OTLP_TRACES_PROTOCOL", "OTEL_EXPORTER_OTLP_PROTOCOL")
# A name is a label of Prometheus; a watch and a reference are ids or tags.
WATCH_AT_START = re.compile(r"([^=@]+)=([^=@]+)(?:@([^=@]+))?")
DTYPES = ("float32", "bfloat16", "float16")
# These options name files of security.
SECURITY_FILES = {
    "tls_certificate": "PEM file of the server's certificate, and those between it and its root: serve by TLS",
    "tls_key": "PEM file of its key",
    "tls_client_ca": "PEM file of CAs: every client must show a certificate of one of them (mTLS)",
    "tokens": "file of bearer tokens (see patchclamp token): every call must bring one",
    "policy": "YAML file that says what each tenant may do",
    "audit_log": "file that gets a JSON line for every call that edited the model or changed an artifact",
}
SWITCHES = {
    "audit_prompts": "record the text of prompts in the audit log too (default: off)",
    "metrics_tls": "serve /metrics with the certificate of the gRPC port (default: off)",
}
# These are options of the engine, whose own defaults hold where none is given.
ENGINE_OPTIONS = {
    "max_sequences": "sequences that run at once",
    "max_tokens_per_step": "token rows of one forward pass",
    "kv_block_size": "tokens in a KV block",
    "kv_cache_tokens": "tokens the KV cache holds",
    "max_failed_steps": "forward passes that may fail in a row before the server ends",
    "max_watches": "watches that may run, at most 63",
    "max_watched_items": "items that may be watched",
    "max_waiting": "requests that may wait; more are refused with RESOURCE_EXHAUSTED",
    "max_waiting_kv_tokens": "tokens of KV cache that waiting requests may need (default: eight times what there is)",
}


def add_model_arguments(parser: argparse.ArgumentParser) -> None:
    _add(parser, "--model", help='"embedded", a hub id, a directory or a .gguf file (default: embedded)')
    parser.add_argument("--json", action="store_true", help="print the result as one JSON object")


def add_serve_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the options of `serve`. A variable can set each: --drain-seconds is PATCHCLAMP_DRAIN_SECONDS."""
    add_model_arguments(parser)
    _add(
        parser,
        "--address",
        type=_address,
        help="host:port, [IPv6]:port or unix:path; port 0 takes a free one (default: 127.0.0.1:50051)",
    )
    _add(
        parser,
        "--metrics-address",
        type=_tcp_address,
        help="host:port of /metrics and /healthz (default: 127.0.0.1:9464)",
    )
    _add(
        parser,
        "--health-address",
        type=_address,
        help="address of the health service alone, without TLS, for probes that speak none (default: nowhere)",
    )
    _add(parser, "--artifacts-url", help="directory or fsspec URL (default: patchclamp/artifacts in the data home)")
    _add(parser, "--dtype", type=_one_of(*DTYPES), help="float32, bfloat16 or float16 (default: float32)")
    _add(parser, "--device", help="torch device (default: cpu)")
    _add(parser, "--max-message-bytes", type=_positive, help="largest request (default: 4 MiB)")
    _add(parser, "--max-calls", type=_positive, help="calls answered at once, streams included (default: 4096)")
    _add(parser, "--max-upload-bytes", type=_positive, help="largest artifact (default: 256 MiB)")
    _add(
        parser,
        "--max-concurrent-upload-bytes",
        type=_positive,
        help="bytes of artifacts that may be arriving at once (default: 1 GiB)",
    )
    _add(
        parser,
        "--upload-idle-seconds",
        type=_seconds,
        help="how long an upload may wait for its next chunk (default: 30)",
    )
    _add(parser, "--drain-seconds", type=_seconds, help="how long running work may go on after SIGTERM (default: 30)")
    _add(
        parser,
        "--step-timeout-seconds",
        type=_seconds,
        help="health says NOT_SERVING while a forward pass takes longer; 0 watches none (default: 300)",
    )
    for name, text in ENGINE_OPTIONS.items():
        _add(parser, f"--{name.replace('_', '-')}", type=ENGINE_TYPES.get(name, _positive), help=text)
    _add(parser, "--prefix-cache", type=_one_of("on", "off"), help="reuse KV blocks of equal prefixes (default: on)")
    _add(parser, "--kernels", type=_one_of("on", "off"), help="run steps on Triton kernels (default: on with CUDA)")
    _add(
        parser,
        "--batch-invariant",
        type=_one_of("on", "off"),
        help="what a request is told does not depend on what else runs (default: on in float32 on a CPU)",
    )
    for name, text in SECURITY_FILES.items():
        _add(parser, f"--{name.replace('_', '-')}", help=text)
    for name, text in SWITCHES.items():
        _add(parser, f"--{name.replace('_', '-')}", type=_one_of("on", "off"), help=text)
    _add(
        parser,
        "--decode-graphs",
        type=_one_of("on", "off"),
        help="replay decode steps as CUDA graphs (default: on with CUDA)",
    )
    _add(
        parser,
        "--watch",
        dest="watches",
        action=_Together,
        type=_watches,
        metavar="NAME=WATCH[@REFERENCE]",
        help="run a stored watch from the start, with its drift from a reference; repeatable, or with commas",
    )
    _add(
        parser,
        "--watch-poll-seconds",
        type=_interval,
        help="how often the artifact store is looked at for watches started on another server (default: 5)",
    )
    _add(parser, "--tracing", type=_tracing, help="otlp: send OpenTelemetry traces to a collector (default: off)")
    _add(
        parser,
        "--otlp-endpoint",
        type=_endpoint,
        help="the collector, e.g. http://localhost:4317 (default: OTEL_EXPORTER_OTLP_ENDPOINT, else that)",
    )


def serve(args: argparse.Namespace) -> int:
    """Loads the model, serves until SIGTERM or SIGINT, and drains. Returns the exit code."""
    _configure_process()
    from patchclamp_server.engine.faults import is_out_of_memory
    from patchclamp_server.model.errors import ModelSourceError
    from patchclamp_server.model.progress import RichProgress
    from patchclamp_server.rpc.server import EngineStopped, Server, check_files, load, reserve
    from patchclamp_server.security.configuration import ConfigurationError

    logging.basicConfig(level=logging.INFO, format=LOG_FORMAT)
    config = config_from(args)
    if config.tracing == "otlp":
        _log_trace_ids()
    try:
        check_files(config)
        # This comes before the model: whoever starts a second server need not wait for weights to hear of the first.
        reserved = reserve(config)
        with RichProgress() as progress:
            model = load(config, progress)
        server = Server(model, config)

        def ready(address: str) -> None:
            if args.json:
                print(json.dumps({"address": address, "metrics_port": server.metrics_port}), flush=True)
            else:
                print(f"serving on {address}, metrics on port {server.metrics_port}", flush=True)

        asyncio.run(server.run(ready, reserved))
    except (ConfigurationError, ModelSourceError, EngineStopped, OSError) as error:
        return _failed("serve", error)
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        return _failed("serve", f"out of memory: {error}; --kv-cache-tokens asks for less")
    except KeyboardInterrupt:  # while the model loads; afterwards it is a signal like any other
        return 130
    return 0


def add_token_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("action", choices=("new",), help="new: make a token")
    parser.add_argument("--tenant", required=True, help="whom it is for")
    parser.add_argument("--expires", metavar="TIME", help="after how long, such as 12h or 30d (default: never)")
    parser.add_argument("--json", action="store_true", help="print the result as one JSON object")


def token(args: argparse.Namespace) -> int:
    """Prints a new token, shown this once, and the line for the file of --tokens. Returns the exit code."""
    from patchclamp_server.security.tokens import new_token, parse_duration

    try:
        expires = None if args.expires is None else time.time() + parse_duration(args.expires)
        presented, kept = new_token(args.tenant, expires)
        line = kept.line
    # A time beyond the calendar raises OverflowError.
    except (ValueError, OverflowError) as error:
        print(f"patchclamp token: {error}", file=sys.stderr)
        return 2
    if args.json:
        print(json.dumps({"token": presented, "line": line}))
    else:
        print(f"token, for the client (shown this once):\n  {presented}")
        print(f"line, for the file of --tokens:\n  {line}")
    return 0


def pull(args: argparse.Namespace) -> int:
    """Fetches, verifies and converts the model, so that `serve` starts without a network. Returns the exit code."""
    _configure_process()
    from patchclamp_server.model.errors import ModelSourceError
    from patchclamp_server.model.load import load_model
    from patchclamp_server.model.progress import RichProgress

    try:
        with RichProgress() as progress:
            info = load_model(args.model or "embedded", progress=progress).info
    except (ModelSourceError, OSError) as error:
        return _failed("pull", error)
    except KeyboardInterrupt:
        return 130
    name, fingerprint = info.name, info.fingerprint
    print(json.dumps({"name": name, "fingerprint": fingerprint}) if args.json else f"{name} {fingerprint}")
    return 0


def _failed(command: str, error: Exception | str) -> int:
    """Prints one line for what the operator can mend; a defect of ours keeps its traceback."""
    print(f"patchclamp {command}: error: {error}", file=sys.stderr)
    return 1


def _configure_process() -> None:
    """Sets threads, and where compiled code is kept (the package may be read-only), before torch and numba are
    imported."""
    configure_threads()
    if "NUMBA_CACHE_DIR" not in os.environ:
        os.environ["NUMBA_CACHE_DIR"] = _compiled_code_directory()


def _compiled_code_directory() -> str:
    """Returns a directory below the cache; where that cannot be written, one that is removed with this process."""
    from patchclamp_server.model.digests import cache_root

    directory = cache_root() / "numba"
    try:
        directory.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=directory):
            return str(directory)
    except OSError:
        temporary = tempfile.mkdtemp(prefix="patchclamp-numba-")
        atexit.register(shutil.rmtree, temporary, ignore_errors=True)
        return temporary


def _log_trace_ids() -> None:
    from patchclamp_server.rpc.tracing.spans import put_trace_ids_on_log_records

    put_trace_ids_on_log_records()
    for handler in logging.getLogger().handlers:
        handler.setFormatter(logging.Formatter(TRACED_LOG_FORMAT))


def config_from(args: argparse.Namespace) -> "ServerConfig":
    """Returns what was given, over the defaults of ServerConfig and EngineConfig."""
    from patchclamp_server.engine.config import EngineConfig
    from patchclamp_server.rpc.config import ServerConfig, WatchAtStart

    given = {name: value for name, value in vars(args).items() if value is not None}
    engine = {name: given[name] for name in ENGINE_OPTIONS if name in given}
    if "prefix_cache" in given:
        engine["enable_prefix_cache"] = given["prefix_cache"] == "on"
    for name in SWITCHES:
        if name in given:
            given[name] = given[name] == "on"
    for name in ("kernels", "decode_graphs", "batch_invariant"):
        if name in given:
            engine[name] = given[name] == "on"
    if "watches" in given:
        given["watches"] = tuple(WatchAtStart(*watch) for watch in given["watches"])
    fields = {name for name in ServerConfig.__dataclass_fields__ if name != "engine"}
    return ServerConfig(engine=EngineConfig(**engine), **{n: v for n, v in given.items() if n in fields})


def _add(parser: argparse.ArgumentParser, option: str, **arguments: object) -> None:
    """Adds an option whose default is its variable, checked like a given value; it is None when neither is set."""
    variable = "PATCHCLAMP_" + option.removeprefix("--").replace("-", "_").upper()
    arguments["help"] = f"{arguments['help']} [{variable}]"
    parser.add_argument(option, default=os.environ.get(variable) or None, **arguments)  # type: ignore[arg-type]


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"expected at least 1, got {value}")
    return value


def _address(text: str) -> str:
    try:
        Address.parse(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None
    return text


def _tcp_address(text: str) -> str:
    try:
        address = Address.parse(text)
    except ValueError:
        address = Address(path=text)
    if address.path:
        raise argparse.ArgumentTypeError(f"expected host:port or [IPv6 address]:port, got {text!r}")
    return text


def _seconds(text: str) -> float:
    value = float(text)
    if not 0.0 <= value < float("inf"):
        raise argparse.ArgumentTypeError(f"expected a number of seconds, got {text}")
    return value


def _interval(text: str) -> float:
    value = _seconds(text)
    if value < 0.1:
        raise argparse.ArgumentTypeError(f"expected at least 0.1 seconds, got {text}")
    return value


class _Together(argparse.Action):
    """Joins the values of all its uses; those of the variable count only where it is not used at all."""

    def __call__(
        self, parser: argparse.ArgumentParser, namespace: argparse.Namespace, values: Any, option: str | None = None
    ) -> None:
        # Until the parser is done, a default is still text.
        before = getattr(namespace, self.dest)
        setattr(namespace, self.dest, (*before, *values) if isinstance(before, tuple) else values)


def _watches(text: str) -> tuple[tuple[str, str, str], ...]:
    """Parses "joy=joyful-watch@joyful-normal,toxic=sha256:..." as (name, watch, reference)."""
    found = []
    for part in filter(None, text.split(",")):
        match = WATCH_AT_START.fullmatch(part)
        if match is None:
            raise argparse.ArgumentTypeError(f"expected NAME=WATCH or NAME=WATCH@REFERENCE, got {part!r}")
        found.append((match[1], match[2], match[3] or ""))
    return tuple(found)


def _tracing(text: str) -> str:
    """Refuses tracing before the model is loaded where it could not work."""
    choice = _one_of("off", "otlp")(text)
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


def _endpoint(text: str) -> str:
    url = urlsplit(text)
    if url.scheme not in ("http", "https") or not url.hostname or url.path.strip("/"):
        raise argparse.ArgumentTypeError(f"expected http://host:port or https://host:port, got {text!r}")
    return text


def _one_of(*choices: str) -> Callable[[str], str]:
    """Checks a choice as a type, because argparse does not check `choices` for a default."""

    def check(text: str) -> str:
        if text not in choices:
            raise argparse.ArgumentTypeError(f"expected one of {', '.join(choices)}, got {text!r}")
        return text

    return check


def _watch_count(text: str) -> int:
    """Bounds watches, because the bits of a number mark their rows."""
    value = _positive(text)
    if value > 63:
        raise argparse.ArgumentTypeError(f"expected at most 63, got {value}")
    return value


ENGINE_TYPES = {"max_watches": _watch_count}


def main(arguments: list[str] | None = None) -> int:
    """Runs `python -m patchclamp_server.cli`: `patchclamp serve` without the client's package of commands."""
    parser = argparse.ArgumentParser(prog="patchclamp-server")
    add_serve_arguments(parser)
    return serve(parser.parse_args(arguments))


if __name__ == "__main__":
    sys.exit(main())
