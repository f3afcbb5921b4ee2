"""The command line as a whole. Exit status: 0 done, 1 the server refused or failed, 2 wrong usage, 130 interrupted."""

import argparse
import json
import os
import sys
from collections.abc import Sequence
from importlib.metadata import version

from patchclamp.cli import (
    activations,
    compare,
    completion,
    features,
    generate,
    heads,
    http_front,
    jobs,
    lens,
    models,
    neurons,
    probes,
    score,
    serving,
    sparsity,
    tokens,
    vectors,
    watch,
)
from patchclamp.cli.naming import replace_hint
from patchclamp.cli.parser import Parser
from patchclamp.cli.terminal import escape_what_cannot_be_written, styled
from patchclamp.errors import PatchclampError


def main(argv: Sequence[str] | None = None) -> int:
    arguments = list(sys.argv[1:] if argv is None else argv)
    escape_what_cannot_be_written()
    if arguments and arguments[0] in serving.COMMANDS:
        return serving.run(arguments[0], arguments[1:])
    args = build_parser().parse_args(arguments)
    try:
        status: int = args.run(args)
        sys.stdout.flush()
        return status
    except PatchclampError as error:
        text = f"error: {error}{replace_hint(args, error)}"
        _report(json.dumps({"error": error.to_dict()}) if args.json else styled(text, "red", sys.stderr))
        return 1
    except BrokenPipeError:
        # Whoever read our output has enough. Python would flush stdout once more at exit, and fail again.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except (ValueError, OSError) as error:
        _report(styled(f"error: {error}", "red", sys.stderr))
        return 2
    except KeyboardInterrupt:
        _report("")
        return 130


def build_parser() -> argparse.ArgumentParser:
    purpose = "Generate text while you steer activations and clamp neurons."
    parser: argparse.ArgumentParser = Parser(prog="patchclamp", description=purpose)
    parser.add_argument("--version", action="version", version=f"%(prog)s {version('patchclamp')}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    serving.add_parsers(commands)
    generate.add_parser(commands)
    score.add_parser(commands)
    compare.add_parser(commands)
    lens.add_parser(commands)
    vectors.add_parser(commands)
    sparsity.add_parser(commands)
    heads.add_parser(commands)
    neurons.add_parser(commands)
    activations.add_parser(commands)
    probes.add_parser(commands)
    features.add_parser(commands)
    watch.add_parser(commands)
    jobs.add_parser(commands)
    http_front.add_parser(commands)
    tokens.add_parsers(commands)
    models.add_parsers(commands)
    completion.add_parser(commands)
    return parser


def _report(text: str) -> None:
    print(text, file=sys.stderr)
