"""patchclamp watch reference"""

import argparse
import math

from patchclamp import requests
from patchclamp.cli.detach import add_detach_argument, job_outcome
from patchclamp.cli.naming import add_naming_arguments, naming_options, note_stored
from patchclamp.cli.options import connection_options, given
from patchclamp.cli.parser import count
from patchclamp.cli.terminal import print_json
from patchclamp.client import Client
from patchclamp.results import Artifact


def add_parser(actions: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    parser = actions.add_parser(
        "reference",
        parents=[connection_options(timeout=math.inf)],
        help="record what a running watch sees next, to measure drift by",
    )
    parser.add_argument("name", help="the running watch")
    parser.add_argument("tag", help="tag to store the reference under")
    parser.add_argument("--tokens", type=count, metavar="N", help="how many (default: the window of the watch)")
    parser.add_argument("--use", action="store_true", help="measure drift of the watch against it from then on")
    add_naming_arguments(parser)
    add_detach_argument(parser)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    options = {**given(args, "tokens", "use"), **naming_options(args, args.tag)}
    artifact = job_outcome(args, Client.record_reference, requests.record_reference, args.name, **options)
    if artifact is not None:
        show(args, artifact)
    return 0


def show(args: argparse.Namespace, artifact: Artifact) -> None:
    if args.json:
        print_json(artifact)
    else:
        note_stored(artifact)
