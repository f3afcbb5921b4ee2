"""patchclamp heads detect | score | ablate | circuit | ground | compare | attribute"""

import argparse

from patchclamp.cli.heads import ablate, attribute, circuit, compare, detect, ground, score


def add_parser(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    parser = commands.add_parser("heads", help="find attention heads by what they do, and test them")
    actions = parser.add_subparsers(required=True, metavar="ACTION")
    for action in (detect, score, ablate, circuit, ground, compare, attribute):
        action.add_parser(actions)
