"""patchclamp probes train"""

import argparse

from patchclamp.cli.probes import train


def add_parser(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    parser = commands.add_parser("probes", help="train models that read a label or a number off activations")
    actions = parser.add_subparsers(required=True, metavar="ACTION")
    train.add_parser(actions)
