"""`patchclamp serve`, `pull` and `quantize-card`. Imports nothing heavy before the threads are configured."""

import argparse
import asyncio
import json
import logging
import sys

from patchclamp_server.cli.options import add_serve_arguments, config_from
from patchclamp_server.cpu.compiled_code import keep_compiled_code
from patchclamp_server.threads import configure_threads

logger = logging.getLogger(__name__)

LOG_FORMAT = "%(asctime)s %(levelname)s %(name)s: %(message)s"
TRACED_LOG_FORMAT = "%(asctime)s %(levelname)s %(name)s trace_id=%(trace_id)s: %(message)s"


def serve(args: argparse.Namespace) -> int:
    """Loads the model, serves until SIGTERM or SIGINT, and drains. Returns the exit code."""
    said = _configure_process(args.threads, pinned=args.pin_threads == "on")
    from patchclamp_server.cli.http_front import HttpFront
    from patchclamp_server.engine.faults import is_out_of_memory
    from patchclamp_server.engine.memory.start_memory import give_back_start_memory
    from patchclamp_server.model.errors import ModelSourceError
    from patchclamp_server.model.progress import RichProgress
    from patchclamp_server.rpc.at_start import check_files, load, reserve
    from patchclamp_server.rpc.server import EngineStopped, Server
    from patchclamp_server.security.configuration import ConfigurationError

    logging.basicConfig(level=logging.INFO, format=LOG_FORMAT)
    if said:
        logger.info("%s", said)
    try:
        config = config_from(args)
        if config.tracing == "otlp":
            _log_trace_ids()
        check_files(config)
        # This comes before the model: whoever starts a second server need not wait for weights to hear of the first.
        reserved = reserve(config)
        with RichProgress() as progress:
            model, config, plan = load(config, progress)
        server = Server(model, config, plan)
        front = HttpFront(server) if config.http else None

        def ready(address: str) -> None:
            give_back_start_memory()
            at = {"address": address, "metrics_port": server.metrics_port}
            if front is not None:
                at["http"] = front.url
            if args.json:
                print(json.dumps(at), flush=True)
            else:
                over_http = "" if front is None else f", HTTP on {front.url}"
                print(f"serving on {address}{over_http}, metrics on port {server.metrics_port}", flush=True)

        if front is None:
            asyncio.run(server.run(ready, reserved))
        else:
            front.run(server.run(ready, reserved, front.beside))
    except (ConfigurationError, ModelSourceError, EngineStopped, OSError) as error:
        return _failed("serve", error)
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        return _failed("serve", f"out of memory: {error}; --kv-cache-tokens asks for less")
    except KeyboardInterrupt:  # while the model loads; afterwards it is a signal like any other
        return 130
    return 0


def pull(args: argparse.Namespace) -> int:
    """Fetches and verifies the model, so that `serve` starts without a network. Returns the exit code."""
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


def quantize_card(args: argparse.Namespace) -> int:
    """Measures what quantising costs a dense model, prints it and keeps it for `serve`. Returns the exit code."""
    _configure_process(args.threads)
    from patchclamp_server.analysis.quantization import measure
    from patchclamp_server.cli.card import card_text
    from patchclamp_server.model.errors import ModelSourceError
    from patchclamp_server.model.progress import RichProgress
    from patchclamp_server.model.quantization.card import as_json, store_card
    from patchclamp_server.model.quantization.scheme import SCHEMES

    if args.quantize is None or args.model is None:
        return _failed("quantize-card", f"--{'model' if args.model is None else 'quantize'} is needed")
    logging.basicConfig(level=logging.WARNING, format=LOG_FORMAT)
    try:
        with RichProgress() as progress:
            info = measure(args.model, SCHEMES[args.quantize], progress)
        assert info.quantization is not None
        path = store_card(info.fingerprint, info.quantization)
    except (ModelSourceError, OSError) as error:
        return _failed("quantize-card", error)
    except KeyboardInterrupt:
        return 130
    print(json.dumps(as_json(info.quantization)) if args.json else f"{card_text(info)}\n\nkept in {path}")
    return 0


def _failed(command: str, error: Exception | str) -> int:
    """Prints one line for what the operator can mend; a defect of ours keeps its traceback."""
    print(f"patchclamp {command}: error: {error}", file=sys.stderr)
    return 1


def _configure_process(threads: int | None = None, *, pinned: bool = False) -> str:
    """Sets threads, and where compiled code is kept (the package may be read-only), before torch and numba are
    imported. Returns what `keep_compiled_code` has to say."""
    configure_threads(threads, pinned=pinned)
    return keep_compiled_code()


def _log_trace_ids() -> None:
    from patchclamp_server.rpc.tracing.spans import put_trace_ids_on_log_records

    put_trace_ids_on_log_records()
    for handler in logging.getLogger().handlers:
        handler.setFormatter(logging.Formatter(TRACED_LOG_FORMAT))


def main(arguments: list[str] | None = None) -> int:
    """Runs `python -m patchclamp_server.cli`: `patchclamp serve` without the client's package of commands."""
    parser = argparse.ArgumentParser(prog="patchclamp-server")
    add_serve_arguments(parser)
    return serve(parser.parse_args(arguments))
