"""patchclamp completion: a script that completes commands and options in a shell, made by shtab."""

import argparse
import importlib.util
import sys

from patchclamp.cli import serving
from patchclamp.cli.parser import Parser
from patchclamp.cli.terminal import styled
from patchclamp.extras import install_line

SHELLS = ("bash", "zsh", "tcsh", "fish")


def add_parser(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    parser = commands.add_parser(
        "completion",
        help="print a script that completes commands in a shell",
        epilog='For bash: eval "$(patchclamp completion bash)" in ~/.bashrc.',
    )
    parser.add_argument("shell", choices=SHELLS)
    parser.set_defaults(run=run, json=False)


def run(args: argparse.Namespace) -> int:
    if importlib.util.find_spec("shtab") is None:
        hint = f"patchclamp completion needs shtab: {install_line('completion')}"
        print(styled(hint, "red", sys.stderr), file=sys.stderr)
        return 1
    import shtab

    from patchclamp.cli.app import build_parser

    parser = build_parser()
    if importlib.util.find_spec("patchclamp_server") is not None:
        for name in serving.COMMANDS:
            serving.add_arguments(name, _commands(parser)[name])
    _list_choices(parser)
    print(shtab.complete(parser, args.shell))
    return 0


def _commands(parser: argparse.ArgumentParser) -> dict[str, Parser]:
    """Returns the commands below a parser, by their names."""
    found = [action.choices for action in parser._actions if isinstance(action, argparse._SubParsersAction)]
    return dict(found[0]) if found else {}


def _list_choices(parser: argparse.ArgumentParser) -> None:
    """Lists the choices of every option: shtab takes one whose choices are the keys of a dict for a command."""
    for action in parser._actions:
        if isinstance(action.choices, dict) and not isinstance(action, argparse._SubParsersAction):
            action.choices = tuple(action.choices)
    for command in _commands(parser).values():
        _list_choices(command)
