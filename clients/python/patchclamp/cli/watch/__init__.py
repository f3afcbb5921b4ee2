"""patchclamp watch create | start | stop | list | stats | reference | follow"""

import argparse

from patchclamp.cli.watch import create, follow, reference, running, start, stats


def add_parser(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    parser = commands.add_parser("watch", help="measure neurons, features, directions and heads in all that is served")
    actions = parser.add_subparsers(required=True, metavar="ACTION")
    for action in (create, start, running, stats, reference, follow):
        action.add_parser(actions)
