"""patchclamp watch reference"""

import argparse
import math
from typing import cast

from patchclamp import requests
from patchclamp.cli.jobs import add_detach_argument, detach
from patchclamp.cli.naming import add_replace_argument, note_moved
from patchclamp.cli.numbers import count
from patchclamp.cli.options import connect, connection_options, given
from patchclamp.cli.terminal import job_result, note, print_json
from patchclamp.requests import ReferenceOptions


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
    parser.add_argument("--description")
    add_replace_argument(parser)
    add_detach_argument(parser)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    chosen = given(args, "tokens", "description")
    options = {**chosen, "tags": [args.tag], "replace_tags": args.replace, "use": args.use}
    if args.detach:
        return detach(args, requests.record_reference(args.name, **cast(ReferenceOptions, options)))
    with (
        connect(args) as client,
        client.record_reference(args.name, timeout=args.timeout, **cast(ReferenceOptions, options)) as stream,
    ):
        artifact = job_result(stream, quiet=args.json)
    if args.json:
        print_json(artifact)
    else:
        note_moved(artifact)
        note(f"stored as {args.tag} = {artifact.id}")
    return 0
