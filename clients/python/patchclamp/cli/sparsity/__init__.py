"""patchclamp sparsity calibrate | evaluate | core | plot"""

import argparse

from patchclamp.cli.sparsity import calibrate, core, evaluate, plot


def add_parser(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    parser = commands.add_parser("sparsity", help="calibrate, measure and look at sparse inference")
    actions = parser.add_subparsers(required=True, metavar="ACTION")
    for action in (calibrate, evaluate, core, plot):
        action.add_parser(actions)
