"""The commands of the server package, as patchclamp serve, which the thin client does not need."""

import argparse
import sys
from collections.abc import Callable

from patchclamp.cli.parser import Parser
from patchclamp.cli.terminal import styled
from patchclamp.extras import install_line

COMMANDS = {
    "serve": "serve a model",
    "pull": "fetch and verify a model",
    "quantize-card": "measure what quantising costs a dense model",
    "token": "make a bearer token for a server",
}


def add_parsers(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    # The server's own parser reads the arguments, -h included: its defaults must not be imported for other commands.
    for name, purpose in COMMANDS.items():
        commands.add_parser(name, help=purpose, add_help=False)


def add_arguments(name: str, parser: Parser) -> Callable[[argparse.Namespace], int]:
    """Adds what the server package takes for a command, and returns what runs it."""
    from patchclamp_server.cli import commands, options, tokens

    arguments, command = {
        "serve": (options.add_serve_arguments, commands.serve),
        "pull": (options.add_model_arguments, commands.pull),
        "quantize-card": (options.add_card_arguments, commands.quantize_card),
        "token": (tokens.add_token_arguments, tokens.token),
    }[name]
    arguments(parser)
    return command


def run(name: str, argv: list[str]) -> int:
    """Runs a command of the server package, and returns its exit status: 1 with a hint when a package is missing."""
    try:
        parser = Parser(prog=f"patchclamp {name}")
        command = add_arguments(name, parser)
        return command(parser.parse_args(argv))
    except ModuleNotFoundError as error:
        if error.name is None or error.name.startswith("patchclamp"):
            raise
        hint = f"patchclamp {name} needs the server ({error.name} is missing): {install_line('server')}"
        print(styled(hint, "red", sys.stderr), file=sys.stderr)
        return 1
