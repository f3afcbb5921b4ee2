"""patchclamp features import | export | label | search"""

import argparse

from patchclamp.cli.features import files, search


def add_parser(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    parser = commands.add_parser("features", help="sparse autoencoders: import them, and find features")
    actions = parser.add_subparsers(required=True, metavar="ACTION")
    for action in (files, search):
        action.add_parser(actions)
