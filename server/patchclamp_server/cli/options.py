"""The options of `serve` and `pull`, and the configuration that they make. Imports nothing heavy."""

import argparse
import os
from typing import TYPE_CHECKING

from patchclamp_server.cli.option_types import (
    Together,
    address,
    checkpoints,
    endpoint,
    http_address,
    interval,
    one_of,
    positive,
    seconds,
    size,
    slowdown,
    tcp_address,
    tracing,
    watch_count,
    watches,
    words,
)

if TYPE_CHECKING:
    from patchclamp_server.rpc.config import ServerConfig

DTYPES = ("float32", "bfloat16", "float16")
# Those of model/quantization/scheme.py, which is too heavy to be imported here.
QUANTIZE = ("q8_0", "q6_k", "q5_1", "q5_0", "q4_k", "q4_1", "q4_0")
KV_DTYPES = ("model", "bfloat16", "int8")
ACTIVATIONS = ("float32", "int8")
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
    "max_sequences": "sequences that run at once (default: 64)",
    "max_tokens_per_step": "token rows of one forward pass (default: 512)",
    "kv_block_size": "tokens in a KV block (default: 16)",
    "kv_cache_tokens": "tokens the KV cache holds (default: 65536, or as many as fit)",
    "analysis_slowdown": "how many times as long a stream may wait for a token beside analysis, above 1 (default: 1.5)",
    "max_failed_steps": "forward passes that may fail in a row before the server ends (default: 8)",
    "max_watches": "watches that may run, at most 63 (default: 16)",
    "max_watched_items": "items that may be watched (default: 8192)",
    "max_waiting": "requests that may wait; more are refused with RESOURCE_EXHAUSTED (default: 1024)",
    "max_waiting_kv_tokens": "tokens of KV cache that waiting requests may need (default: eight times what there is)",
}
ENGINE_TYPES = {"max_watches": watch_count, "analysis_slowdown": slowdown}


def add_model_arguments(parser: argparse.ArgumentParser) -> None:
    _add(
        parser,
        "--model",
        help='"embedded", a hub id, a directory or a .gguf file, of a split one any part (default: embedded)',
    )
    _add_json(parser)


def add_card_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the options of `quantize-card`."""
    _add(parser, "--model", help="a hub id, or a directory with safetensors (needed)")
    _add_json(parser)
    _add_quantize(parser, "needed")
    _add_threads(parser)


def add_serve_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the options of `serve`. A variable can set each: --drain-seconds is PATCHCLAMP_DRAIN_SECONDS."""
    add_model_arguments(parser)
    _add(
        parser,
        "--address",
        type=address,
        help="host:port, [IPv6]:port or unix:path; port 0 takes a free one (default: 127.0.0.1:50051)",
    )
    _add(
        parser,
        "--metrics-address",
        type=tcp_address,
        help="host:port of /metrics and /healthz (default: 127.0.0.1:9464)",
    )
    _add(
        parser,
        "--health-address",
        type=address,
        help="address of the health service alone, without TLS, for probes that speak none (default: nowhere)",
    )
    _add(
        parser,
        "--http",
        type=http_address,
        help="host:port of OpenAI's API, and of JSON for every RPC, with the certificate of --tls-certificate "
        "(default: nowhere)",
    )
    _add(
        parser,
        "--http-allow-origins",
        type=words,
        metavar="ORIGIN,...",
        help="pages of these origins may call it in a browser, besides its own (default: none)",
    )
    _add(parser, "--artifacts-url", help="directory or fsspec URL (default: patchclamp/artifacts in the data home)")
    _add(parser, "--dtype", type=one_of(*DTYPES), help="float32, bfloat16 or float16 (default: float32)")
    _add(parser, "--device", help="torch device (default: cpu)")
    _add_threads(parser)
    _add(parser, "--pin-threads", type=one_of("on", "off"), help="keep each on a core of its own (default: off)")
    _add_quantize(parser, "default: as they are")
    _add(
        parser,
        "--memory",
        type=size,
        metavar="SIZE",
        help="what all of the server may take, e.g. 4GiB: the KV cache gets what the model leaves (default: as many "
        "tokens as --kv-cache-tokens has by default, or as fit)",
    )
    _add(
        parser,
        "--kv-dtype",
        type=one_of(*KV_DTYPES),
        help="of keys and values: bfloat16 or int8 with --dtype float32 on a CPU (default: model, that of the model)",
    )
    _add(
        parser,
        "--activations",
        type=one_of(*ACTIVATIONS),
        help="what products with coded weights take: float32 is as --dtype has it; int8, on a CPU, is faster and less "
        "exact (default: float32)",
    )
    _add(parser, "--max-message-bytes", type=positive, help="largest request (default: 4 MiB)")
    _add(parser, "--max-calls", type=positive, help="calls answered at once, streams included (default: 4096)")
    _add(parser, "--max-upload-bytes", type=positive, help="largest artifact (default: 256 MiB)")
    _add(
        parser,
        "--max-concurrent-upload-bytes",
        type=positive,
        help="bytes of artifacts that may be arriving at once (default: 1 GiB)",
    )
    _add(
        parser,
        "--max-autoencoder-bytes",
        type=positive,
        help="largest autoencoder, and all that may be arriving: disk, not memory (default: 64 GiB)",
    )
    _add(
        parser,
        "--upload-idle-seconds",
        type=seconds,
        help="how long an upload may wait for its next chunk (default: 30)",
    )
    _add(parser, "--drain-seconds", type=seconds, help="how long running work may go on after SIGTERM (default: 30)")
    _add(
        parser,
        "--step-timeout-seconds",
        type=seconds,
        help="health says NOT_SERVING while a forward pass takes longer; 0 watches none (default: 300)",
    )
    for name, text in ENGINE_OPTIONS.items():
        _add(parser, f"--{name.replace('_', '-')}", type=ENGINE_TYPES.get(name, positive), help=text)
    _add(
        parser,
        "--prefix-cache",
        type=one_of("on", "off"),
        metavar="on|off",
        help="reuse KV blocks of equal prefixes (default: on)",
    )
    _add(
        parser,
        "--kernels",
        type=one_of("on", "off"),
        metavar="on|off",
        help="run steps on Triton kernels (default: on with CUDA)",
    )
    _add(
        parser,
        "--batch-invariant",
        type=one_of("on", "off"),
        metavar="on|off",
        help="what a request is told does not depend on what else runs (default: on in float32 on a CPU)",
    )
    for name, text in SECURITY_FILES.items():
        _add(parser, f"--{name.replace('_', '-')}", help=text)
    for name, text in SWITCHES.items():
        _add(parser, f"--{name.replace('_', '-')}", type=one_of("on", "off"), metavar="on|off", help=text)
    _add(
        parser,
        "--decode-graphs",
        type=one_of("on", "off"),
        metavar="on|off",
        help="replay decode steps as CUDA graphs (default: on with CUDA)",
    )
    _add(
        parser,
        "--watch",
        dest="watches",
        action=Together,
        type=watches,
        metavar="NAME=WATCH[@REFERENCE]",
        help="run a stored watch from the start, with its drift from a reference; repeatable, or with commas",
    )
    _add(
        parser,
        "--watch-poll-seconds",
        type=interval,
        help="how often the artifact store is looked at for watches started on another server (default: 5)",
    )
    _add(
        parser,
        "--match-model",
        dest="match_models",
        action=Together,
        type=checkpoints,
        metavar="NAME=PATH",
        help="a checkpoint that neurons may be matched with, loaded when that is asked for; repeatable, or with commas",
    )
    _add(
        parser,
        "--tracing",
        type=tracing,
        metavar="otlp|off",
        help="otlp: send OpenTelemetry traces to a collector (default: off)",
    )
    _add(
        parser,
        "--otlp-endpoint",
        type=endpoint,
        help="the collector, e.g. http://localhost:4317 (default: OTEL_EXPORTER_OTLP_ENDPOINT, else that)",
    )


def config_from(args: argparse.Namespace) -> "ServerConfig":
    """Returns what was given, over the defaults of ServerConfig and EngineConfig."""
    from patchclamp_server.engine.config import EngineConfig
    from patchclamp_server.rpc.config import ServerConfig, WatchAtStart

    given = {name: value for name, value in vars(args).items() if value is not None}
    engine = {name: given[name] for name in ENGINE_OPTIONS if name in given}
    given["kv_cache_tokens_given"] = "kv_cache_tokens" in given
    if "prefix_cache" in given:
        engine["enable_prefix_cache"] = given["prefix_cache"] == "on"
    for name in SWITCHES:
        if name in given:
            given[name] = given[name] == "on"
    if "kv_dtype" in given:
        engine["kv_dtype"] = given["kv_dtype"]
    for name in ("kernels", "decode_graphs", "batch_invariant"):
        if name in given:
            engine[name] = given[name] == "on"
    if "watches" in given:
        given["watches"] = tuple(WatchAtStart(*watch) for watch in given["watches"])
    fields = {name for name in ServerConfig.__dataclass_fields__ if name != "engine"}
    return ServerConfig(engine=EngineConfig(**engine), **{n: v for n, v in given.items() if n in fields})


def _add_json(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", action="store_true", help="print the result as one JSON object")


def _add_quantize(parser: argparse.ArgumentParser, otherwise: str) -> None:
    _add(
        parser,
        "--quantize",
        type=one_of(*QUANTIZE),
        help=f"blocks that dense weights in safetensors become: {', '.join(QUANTIZE)} ({otherwise})",
    )


def _add_threads(parser: argparse.ArgumentParser) -> None:
    _add(
        parser,
        "--threads",
        type=positive,
        help="threads that share the work of the CPU, at most its cores (default: OMP_NUM_THREADS, else all cores)",
    )


def _add(parser: argparse.ArgumentParser, option: str, **arguments: object) -> None:
    """Adds an option whose default is its variable, checked like a given value; it is None when neither is set."""
    variable = "PATCHCLAMP_" + option.removeprefix("--").replace("-", "_").upper()
    arguments["help"] = f"{arguments['help']} [{variable}]"
    parser.add_argument(option, default=os.environ.get(variable) or None, **arguments)  # type: ignore[arg-type]
