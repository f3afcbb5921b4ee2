"""Options that several commands share, and what they mean for the client."""

import argparse
import os
import sys
from pathlib import Path
from typing import Any, cast

from patchclamp.cli.parser import TokenBias, count, seed
from patchclamp.cli.sparse_spec import add_sparsity_arguments, sparsity_of
from patchclamp.cli.steering import add_steering_arguments, program_of
from patchclamp.client import Client
from patchclamp.confidence import Confidence
from patchclamp.connection import DEFAULT_ADDRESS, DEFAULT_TIMEOUT_SECONDS
from patchclamp.requests import GenerateOptions

TLS_OPTIONS = (
    ("--ca", "PATCHCLAMP_CA", "roots of the server's certificate, PEM: connect by TLS"),
    ("--cert", "PATCHCLAMP_CERT", "certificate of the client, PEM"),
    ("--key", "PATCHCLAMP_KEY", "its key, PEM"),
)
_SECURITY_OPTIONS = (("--token-file", "PATCHCLAMP_TOKEN_FILE", "the bearer token"), *TLS_OPTIONS)
_GENERATE_FIELDS = (
    "temperature",
    "top_k",
    "top_p",
    "min_p",
    "repetition_penalty",
    "presence_penalty",
    "frequency_penalty",
    "seed",
    "max_tokens",
    "min_tokens",
    "logit_bias",
    "stop",
    "ignore_eos",
    "logprobs",
    "prompt_logprobs",
)


def output_options() -> argparse.ArgumentParser:
    """Returns the parent of every command."""
    parser = argparse.ArgumentParser(add_help=False)
    parser.add_argument("--json", action="store_true", help="print one JSON value instead of text")
    return parser


def connection_options(timeout: float = DEFAULT_TIMEOUT_SECONDS) -> argparse.ArgumentParser:
    """Returns the parent of every command that calls a server.

    timeout: default of --timeout; a stream has no deadline, for it takes what it takes.
    """
    parser = argparse.ArgumentParser(add_help=False, parents=[output_options()])
    group = parser.add_argument_group("server")
    group.add_argument(
        "--address",
        default=os.environ.get("PATCHCLAMP_ADDRESS", DEFAULT_ADDRESS),
        help="host:port; several servers: ipv4:HOST:PORT,HOST:PORT "
        f"(default: PATCHCLAMP_ADDRESS, else {DEFAULT_ADDRESS})",
    )
    group.add_argument("--tls", nargs="?", const=True, default=False, metavar="ROOTS.pem", help="connect by TLS")
    for option, variable, text in _SECURITY_OPTIONS:
        group.add_argument(
            option, default=os.environ.get(variable), metavar="FILE", help=f"{text} (default: {variable})"
        )
    group.add_argument(
        "--tls-server-name", metavar="NAME", help="name in the server's certificate (default: the host of --address)"
    )
    group.add_argument(
        "--channel-option",
        action="append",
        default=[],
        type=channel_option,
        metavar="NAME=VALUE",
        help="argument of the channel, by gRPC's name; repeatable",
    )
    group.add_argument("--token-in-clear", action="store_true", help="send the token to another host without TLS")
    group.add_argument(
        "--timeout",
        type=float,
        default=timeout,
        metavar="SECONDS",
        help='deadline of each call (default: %(default)s; "inf" for none)',
    )
    return parser


def connect(args: argparse.Namespace) -> Client:
    """Returns the client that the options describe.

    The bearer token comes from a file or from PATCHCLAMP_TOKEN, because arguments show in process lists.
    """
    token = os.environ.get("PATCHCLAMP_TOKEN") if args.token_file is None else Path(args.token_file).read_text().strip()
    return Client(
        args.address,
        token=token,
        tls=args.ca or args.tls,
        certificate=args.cert,
        key=args.key,
        token_in_clear=args.token_in_clear,
        tls_server_name=args.tls_server_name,
        channel_options=args.channel_option,
        timeout=args.timeout,
    )


def channel_option(text: str) -> tuple[str, str | int]:
    """Reads NAME=VALUE. Whole numbers are numbers to gRPC, and all else is text."""
    name, equals, value = text.partition("=")
    if not name or not equals:
        raise argparse.ArgumentTypeError(f"expected NAME=VALUE, such as grpc.keepalive_time_ms=10000, got {text!r}")
    try:
        return name, int(value)
    except ValueError:
        return name, value


def add_model_argument(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", default="", help="default: the server's model")


def add_prompt_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("prompt", help='text, or "-" to read it from standard input')
    parser.add_argument("--chat", action="store_true", help="send the prompt as a user's turn of a chat")
    parser.add_argument("--system", metavar="TEXT", help="system turn before it; implies --chat")
    add_model_argument(parser)


def add_generation_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds what every command takes that generates from a prompt: `generate_options` reads it."""
    add_prompt_arguments(parser)
    add_steering_arguments(parser)
    _add_sampling_arguments(parser)
    add_sparsity_arguments(parser)
    add_confidence_arguments(parser)


def add_confidence_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds what `confidence_of` reads."""
    group = parser.add_argument_group("confidence")
    group.add_argument("--confidence", action="store_true", help="how far the layers agree on the answer")
    group.add_argument(
        "--option",
        action="append",
        default=[],
        metavar="TEXT",
        help='how the answer may begin, such as " yes": its probability by layer; repeatable, implies --confidence',
    )


def confidence_of(args: argparse.Namespace) -> Confidence | None:
    return Confidence(options=args.option) if args.confidence or args.option else None


def _add_sampling_arguments(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("sampling (default: greedy)")
    group.add_argument("--max-tokens", type=count, metavar="N")
    group.add_argument("--min-tokens", type=count, metavar="N", help="nothing else ends the text before so many")
    group.add_argument("--temperature", type=float)
    group.add_argument("--top-k", type=count, metavar="K")
    group.add_argument("--top-p", type=float)
    group.add_argument("--min-p", type=float)
    group.add_argument("--repetition-penalty", type=float)
    group.add_argument("--presence-penalty", type=float)
    group.add_argument("--frequency-penalty", type=float)
    group.add_argument("--seed", type=seed)
    group.add_argument(
        "--logit-bias",
        action=TokenBias,
        metavar="ID=BIAS",
        help="added to the logit of a token (patchclamp tokenize tells its id); repeatable",
    )
    group.add_argument("--stop", action="append", metavar="TEXT", help="end before this text; repeatable")
    group.add_argument("--ignore-eos", action="store_true", default=None)
    group.add_argument(
        "--prompt-logprobs", type=count, metavar="N", help="those of each token of the prompt, and the N likeliest"
    )
    group.add_argument(
        "--logprobs", type=count, metavar="N", help="log-probabilities of each token and the N likeliest"
    )


def prompt_of(args: argparse.Namespace) -> str | list[tuple[str, str]]:
    """Returns the text, or with --chat or --system the turns of a chat."""
    text: str = sys.stdin.read() if args.prompt == "-" else args.prompt
    if not args.chat and args.system is None:
        return text
    system = [] if args.system is None else [("system", args.system)]
    return [*system, ("user", text)]


def given(args: argparse.Namespace, *names: str) -> dict[str, Any]:
    """Returns those of these options that were given; the rest is left to the server's defaults."""
    return {name: getattr(args, name) for name in names if getattr(args, name) is not None}


def generate_options(args: argparse.Namespace) -> GenerateOptions:
    """Returns what was given; the rest is left to the server's defaults."""
    options = given(args, *_GENERATE_FIELDS)
    reports = {"sparsity": sparsity_of(args), "confidence": confidence_of(args)}
    return cast(GenerateOptions, {**options, "model": args.model, "program": program_of(args), **reports})
