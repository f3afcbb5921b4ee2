"""patchclamp activations read | patch"""

import argparse

from patchclamp.cli.activations import patch, read


def add_parser(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    parser = commands.add_parser("activations", help="what texts hold at the sites of the model")
    actions = parser.add_subparsers(required=True, metavar="ACTION")
    for action in (read, patch):
        action.add_parser(actions)
