"""patchclamp activations patch"""

import argparse

from patchclamp.cli.activations import patch


def add_parser(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    parser = commands.add_parser("activations", help="put activations of one run into another")
    actions = parser.add_subparsers(required=True, metavar="ACTION")
    for action in (patch,):
        action.add_parser(actions)
