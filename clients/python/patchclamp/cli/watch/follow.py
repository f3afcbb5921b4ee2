"""patchclamp watch follow"""

import argparse
import math
import sys
from typing import cast

from patchclamp.cli.options import connect, connection_options, given
from patchclamp.cli.parser import count
from patchclamp.cli.terminal import note, print_json
from patchclamp.requests import FollowOptions
from patchclamp.results import Activation


def add_parser(actions: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    parser = actions.add_parser(
        "follow",
        parents=[connection_options(timeout=math.inf)],
        help="activations above their thresholds as they occur; with --json one object a line",
    )
    parser.add_argument("name", help="the running watch")
    parser.add_argument("--item", action="append", dest="items", metavar="NAME", help="only this one; repeatable")
    parser.add_argument(
        "--threshold",
        type=float,
        help="in place of the items' own, which are silent while they are derived from the first tokens",
    )
    parser.add_argument("--max-events", type=count, metavar="N", help="end after so many (default: never)")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    options = cast(FollowOptions, given(args, "items", "threshold", "max_events"))
    with connect(args) as client, client.watch_activations(args.name, timeout=args.timeout, **options) as stream:
        for batch in stream:
            for activation in batch.activations:
                if args.json:
                    print_json(activation, indent=None)
                else:
                    print(_line(activation))
            # Whoever reads a pipe wants them as they occur.
            sys.stdout.flush()
            if batch.dropped:
                note(f"{batch.dropped} left out: they occur faster than they are read")
    return 0


def _line(activation: Activation) -> str:
    where = f"{activation.sequence}:{activation.position}"
    return (
        f"{activation.seconds:10.3f} s  {where:>10}  {activation.value:12.4f}  {activation.item}  {activation.token!r}"
    )
