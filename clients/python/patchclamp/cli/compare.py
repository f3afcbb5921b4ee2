"""patchclamp compare"""

import argparse
import math

from patchclamp.cli.generate import print_ending
from patchclamp.cli.options import (
    add_generation_arguments,
    connect,
    connection_options,
    generate_options,
    prompt_of,
)
from patchclamp.cli.terminal import heading, print_json
from patchclamp.results import CompareEvent, CompareText


def add_parser(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    parser = commands.add_parser(
        "compare",
        parents=[connection_options(timeout=math.inf)],
        help="edited beside unedited, with the divergence at every token",
    )
    add_generation_arguments(parser)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    with connect(args) as client, client.compare(prompt_of(args), **generate_options(args)) as stream:
        if args.json:
            print_json(stream.result())
            return 0
        heading("edited")
        result = stream.result(_print_edited)
    print()
    heading("baseline")
    print(result.baseline.text)
    heading("divergence")
    print(result.summary)
    print_ending(result.edited)
    return 0


def _print_edited(event: CompareEvent) -> None:
    if isinstance(event, CompareText) and event.side == "edited":
        print(event.chunk.text, end="", flush=True)
