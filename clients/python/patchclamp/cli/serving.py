"""patchclamp serve, patchclamp pull: the commands of the server package, which the thin client does not need."""

import argparse
import sys
from types import ModuleType

from patchclamp.cli.terminal import styled


def add_parsers(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    # The server's own parser reads the arguments, -h included: its defaults must not be imported for other commands.
    for name, purpose in (("serve", "serve a model"), ("pull", "fetch and verify a model")):
        commands.add_parser(name, help=purpose, add_help=False)


def run(name: str, argv: list[str]) -> int:
    server = _server_commands()
    if server is None:
        return 1
    parser = argparse.ArgumentParser(prog=f"patchclamp {name}")
    if name == "serve":
        server.add_serve_arguments(parser)
    else:
        server.add_model_arguments(parser)
    args = parser.parse_args(argv)
    status: int = server.serve(args) if name == "serve" else server.pull(args)
    return status


def _server_commands() -> ModuleType | None:
    try:
        from patchclamp_server import cli
    except ModuleNotFoundError as error:
        message = f"this command needs the server ({error.name} is missing): pip install 'patchclamp[server]'"
        print(styled(message, "red", sys.stderr), file=sys.stderr)
        return None
    return cli
