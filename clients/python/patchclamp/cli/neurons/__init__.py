"""patchclamp neurons decode | find | localize | evaluate | census | describe | match | compare"""

import argparse

from patchclamp.cli.neurons import census, compare, decode, describe, evaluate, find, localize, match


def add_parser(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    parser = commands.add_parser("neurons", help="find neurons, read what they stand for, and test them")
    actions = parser.add_subparsers(required=True, metavar="ACTION")
    for action in (decode, find, localize, evaluate, census, describe, match, compare):
        action.add_parser(actions)
