"""patchclamp sparsity calibrate"""

import argparse
import math

from patchclamp import requests
from patchclamp.cli.detach import add_detach_argument, job_outcome
from patchclamp.cli.naming import add_naming_arguments, naming_options, note_stored
from patchclamp.cli.options import connection_options, given
from patchclamp.cli.sparse_spec import policy
from patchclamp.cli.sparsity.evaluate import CARD_HEADER, card_cells
from patchclamp.cli.sparsity.texts import add_text_arguments, text_options, texts_of
from patchclamp.cli.terminal import note, print_json, table
from patchclamp.client import Client
from patchclamp.results import CalibratedProfile


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
    add_naming_arguments(parser)
    add_detach_argument(parser)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    options = {**text_options(args), **given(args, "holdout_fraction"), **naming_options(args, args.name)}
    result = job_outcome(
        args, Client.calibrate_profile, requests.calibrate_profile, args.policy, texts_of(args), **options
    )
    if result is not None:
        show(args, result)
    return 0


def show(args: argparse.Namespace, result: CalibratedProfile) -> None:
    if args.json:
        print_json(result)
        return
    rows = [
        (args.name or "calibrated", *card_cells(result.quality)),
        ("random set", *card_cells(result.random_control)),
    ]
    table(("", *CARD_HEADER), rows)
    card = result.quality
    note(f"{card.scored_tokens} tokens of {card.documents} held-out documents; dense {card.dense_perplexity:.2f}")
    note_stored(result.artifact)
