"""patchclamp sparsity calibrate"""

import argparse
import math
from typing import cast

from patchclamp import requests
from patchclamp.cli.jobs import add_detach_argument, detach
from patchclamp.cli.naming import add_replace_argument, note_moved
from patchclamp.cli.options import connect, connection_options, given
from patchclamp.cli.sparse_spec import policy
from patchclamp.cli.sparsity.cards import CARD_HEADER, card_cells
from patchclamp.cli.sparsity.texts import add_text_arguments, text_options, texts_of
from patchclamp.cli.terminal import job_result, note, print_json, table
from patchclamp.requests import CalibrateOptions


def add_parser(actions: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    parser = actions.add_parser(
        "calibrate", parents=[connection_options(timeout=math.inf)], help="make the profile of a policy from text"
    )
    parser.add_argument("name", help="tag to store it under")
    parser.add_argument(
        "--policy",
        type=policy,
        required=True,
        metavar="POLICY[:SETTING,...]",
        help="for example fovea:keep_ratio=.5,bits=3",
    )
    add_text_arguments(parser)
    parser.add_argument("--holdout-fraction", type=float, metavar="SHARE", help="of the text, for the quality card")
    parser.add_argument("--description")
    add_replace_argument(parser)
    add_detach_argument(parser)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    chosen = given(args, "holdout_fraction", "description")
    options = cast(
        CalibrateOptions, {**text_options(args), **chosen, "tags": [args.name], "replace_tags": args.replace}
    )
    if args.detach:
        return detach(args, requests.calibrate_profile(args.policy, texts_of(args), **options))
    with (
        connect(args) as client,
        client.calibrate_profile(args.policy, texts_of(args), timeout=args.timeout, **options) as stream,
    ):
        result = job_result(stream, quiet=args.json)
    if args.json:
        print_json(result)
        return 0
    rows = [(args.name, *card_cells(result.quality)), ("random set", *card_cells(result.random_control))]
    table(("", *CARD_HEADER), rows)
    card = result.quality
    note(f"{card.scored_tokens} tokens of {card.documents} held-out documents; dense {card.dense_perplexity:.2f}")
    note_moved(result.artifact)
    note(f"stored as {args.name} = {result.artifact.id}")
    return 0
