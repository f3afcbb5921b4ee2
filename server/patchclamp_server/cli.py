"""`patchclamp serve` and `patchclamp pull`. Imports nothing heavy before the threads are configured."""

import argparse
import asyncio
import json
import logging
import os
import sys
from collections.abc import Callable
from typing import TYPE_CHECKING

from patchclamp_server.threads import configure_threads

if TYPE_CHECKING:
    from patchclamp_server.config import ServerConfig

DTYPES = ("float32", "bfloat16", "float16")
# Options of the engine: its own defaults hold where none is given.
ENGINE_OPTIONS = {
    "max_sequences": "sequences that run at once",
    "max_tokens_per_step": "token rows of one forward pass",
    "kv_block_size": "tokens in a KV block",
    "kv_cache_tokens": "tokens the KV cache holds",
    "max_waiting": "requests that may wait; more are refused with RESOURCE_EXHAUSTED",
}


def add_model_arguments(parser: argparse.ArgumentParser) -> None:
    _add(parser, "--model", help='"embedded", a hub id, a directory or a .gguf file (default: embedded)')
    parser.add_argument("--json", action="store_true", help="print the result as one JSON object")


def add_serve_arguments(parser: argparse.ArgumentParser) -> None:
    """Every option can be set by a variable: --drain-seconds by PATCHCLAMP_DRAIN_SECONDS."""
    add_model_arguments(parser)
    _add(
        parser,
        "--address",
        type=_address,
        help="host:port; port 0 takes a free one (default: 127.0.0.1:50051)",
    )
    _add(parser, "--metrics-address", type=_address, help="host:port of /metrics (default: 127.0.0.1:9464)")
    _add(parser, "--artifacts-url", help="directory or fsspec URL (default: patchclamp/artifacts in the data home)")
    _add(parser, "--dtype", type=_one_of(*DTYPES), help="float32, bfloat16 or float16 (default: float32)")
    _add(parser, "--device", help="torch device (default: cpu)")
    _add(parser, "--max-message-bytes", type=_positive, help="largest request (default: 4 MiB)")
    _add(parser, "--drain-seconds", type=_seconds, help="how long running work may go on after SIGTERM (default: 30)")
    for name, text in ENGINE_OPTIONS.items():
        _add(parser, f"--{name.replace('_', '-')}", type=_positive, help=text)
    _add(parser, "--prefix-cache", type=_one_of("on", "off"), help="reuse KV blocks of equal prefixes (default: on)")
    _add(parser, "--kernels", type=_one_of("on", "off"), help="run steps on Triton kernels (default: on with CUDA)")
    _add(
        parser,
        "--decode-graphs",
        type=_one_of("on", "off"),
        help="replay decode steps as CUDA graphs (default: on with CUDA)",
    )


def serve(args: argparse.Namespace) -> int:
    """Load the model, serve until SIGTERM or SIGINT, drain. Returns the exit code."""
    _configure_process()
    from patchclamp_server.model.errors import ModelSourceError
    from patchclamp_server.model.progress import RichProgress
    from patchclamp_server.rpc.server import Server, load

    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    config = config_from(args)
    try:
        with RichProgress() as progress:
            model = load(config, progress)
        server = Server(model, config)

        def ready(address: str) -> None:
            if args.json:
                print(json.dumps({"address": address, "metrics_port": server.metrics_port}), flush=True)
            else:
                print(f"serving on {address}, metrics on port {server.metrics_port}", flush=True)

        asyncio.run(server.run(ready))
    except (ModelSourceError, OSError) as error:
        print(f"patchclamp serve: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:  # while the model loads; afterwards it is a signal like any other
        return 130
    return 0


def pull(args: argparse.Namespace) -> int:
    """Fetch, verify and convert the model, so that `serve` starts without a network. Returns the exit code."""
    _configure_process()
    from patchclamp_server.model.errors import ModelSourceError
    from patchclamp_server.model.load import load_model
    from patchclamp_server.model.progress import RichProgress

    try:
        with RichProgress() as progress:
            info = load_model(args.model or "embedded", progress=progress).info
    except ModelSourceError as error:
        print(f"patchclamp pull: {error}", file=sys.stderr)
        return 1
    name, fingerprint = info.name, info.fingerprint
    print(json.dumps({"name": name, "fingerprint": fingerprint}) if args.json else f"{name} {fingerprint}")
    return 0


def _configure_process() -> None:
    """Before torch and numba are imported: threads, and where compiled code is kept (the package may be read-only)."""
    from patchclamp_server.model.digests import cache_root

    configure_threads()
    os.environ.setdefault("NUMBA_CACHE_DIR", str(cache_root() / "numba"))


def config_from(args: argparse.Namespace) -> "ServerConfig":
    """What was given, over the defaults of ServerConfig and EngineConfig."""
    from patchclamp_server.config import ServerConfig
    from patchclamp_server.engine.config import EngineConfig

    given = {name: value for name, value in vars(args).items() if value is not None}
    engine = {name: given[name] for name in ENGINE_OPTIONS if name in given}
    if "prefix_cache" in given:
        engine["enable_prefix_cache"] = given["prefix_cache"] == "on"
    for name in ("kernels", "decode_graphs"):
        if name in given:
            engine[name] = given[name] == "on"
    fields = {name for name in ServerConfig.__dataclass_fields__ if name != "engine"}
    return ServerConfig(engine=EngineConfig(**engine), **{n: v for n, v in given.items() if n in fields})


def _add(parser: argparse.ArgumentParser, option: str, **arguments: object) -> None:
    """An option whose default is its variable, checked like a value on the command line; None when neither is set."""
    variable = "PATCHCLAMP_" + option.removeprefix("--").replace("-", "_").upper()
    arguments["help"] = f"{arguments['help']} [{variable}]"
    parser.add_argument(option, default=os.environ.get(variable) or None, **arguments)  # type: ignore[arg-type]


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"expected at least 1, got {value}")
    return value


def _address(text: str) -> str:
    host, _, port = text.rpartition(":")
    if not host or not port.isdecimal() or int(port) > 65535:
        raise argparse.ArgumentTypeError(f"expected host:port, got {text!r}")
    return text


def _seconds(text: str) -> float:
    value = float(text)
    if not 0.0 <= value < float("inf"):
        raise argparse.ArgumentTypeError(f"expected a number of seconds, got {text}")
    return value


def _one_of(*choices: str) -> Callable[[str], str]:
    """A type rather than argparse's `choices`, which are not checked for a default."""

    def check(text: str) -> str:
        if text not in choices:
            raise argparse.ArgumentTypeError(f"expected one of {', '.join(choices)}, got {text!r}")
        return text

    return check


def main(arguments: list[str] | None = None) -> int:
    """`python -m patchclamp_server.cli`: `patchclamp serve` without the client's package of commands."""
    parser = argparse.ArgumentParser(prog="patchclamp-server")
    add_serve_arguments(parser)
    return serve(parser.parse_args(arguments))


if __name__ == "__main__":
    sys.exit(main())
