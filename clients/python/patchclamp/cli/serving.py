"""patchclamp serve, pull and token: the commands of the server package, which the thin client does not need."""

import argparse
import sys

from patchclamp.cli.terminal import styled

COMMANDS = {
    "serve": "serve a model",
    "pull": "fetch and verify a model",
    "token": "make a bearer token for a server",
}


def add_parsers(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    # The server's own parser reads the arguments, -h included: its defaults must not be imported for other commands.
    for name, purpose in COMMANDS.items():
        commands.add_parser(name, help=purpose, add_help=False)


def run(name: str, argv: list[str]) -> int:
    """Exit status 1 with a hint when a package of the extra `server` is missing."""
    try:
        return _run(name, argv)
    except ModuleNotFoundError as error:
        if error.name is None or error.name.startswith("patchclamp"):
            raise
        hint = f"patchclamp {name} needs the server ({error.name} is missing): pip install 'patchclamp[server]'"
        print(styled(hint, "red", sys.stderr), file=sys.stderr)
        return 1


def _run(name: str, argv: list[str]) -> int:
    from patchclamp_server import cli

    parser = argparse.ArgumentParser(prog=f"patchclamp {name}")
    if name == "serve":
        cli.add_serve_arguments(parser)
        return cli.serve(parser.parse_args(argv))
    if name == "token":
        cli.add_token_arguments(parser)
        return cli.token(parser.parse_args(argv))
    cli.add_model_arguments(parser)
    return cli.pull(parser.parse_args(argv))
