"""patchclamp vectors extract"""

import argparse
import math
from typing import cast

from patchclamp import requests
from patchclamp.cli.files import json_lines
from patchclamp.cli.jobs import add_detach_argument, job_outcome
from patchclamp.cli.naming import add_naming_arguments, naming_options, note_stored
from patchclamp.cli.options import connection_options, given
from patchclamp.cli.parser import seed
from patchclamp.cli.steering import layer_list
from patchclamp.cli.terminal import note, print_json, table
from patchclamp.client import Client
from patchclamp.names import METHODS, POOLINGS, SITES
from patchclamp.requests import Messages, PromptLike
from patchclamp.results import TokenProjections


def add_parser(actions: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    parser = actions.add_parser(
        "extract", parents=[connection_options(timeout=math.inf)], help="find a vector from contrast pairs"
    )
    parser.add_argument("name", help="tag to store it under")
    parser.add_argument(
        "--pairs",
        type=pairs_file,
        required=True,
        metavar="FILE",
        help='lines of {"positive": ..., "negative": ...}, each a text or a list of chat messages',
    )
    parser.add_argument("--method", choices=METHODS, default="difference_of_means")
    parser.add_argument("--site", choices=SITES)
    parser.add_argument("--layers", type=layer_list, default="all", help="such as 8-12 (default: %(default)s)")
    parser.add_argument("--pooling", choices=POOLINGS)
    parser.add_argument("--holdout-fraction", type=float, metavar="SHARE")
    parser.add_argument("--seed", type=seed)
    add_naming_arguments(parser)
    add_detach_argument(parser)
    parser.set_defaults(run=run)


def pairs_file(path: str) -> list[tuple[PromptLike, PromptLike]]:
    """Returns (positive, negative) of every line that is not blank."""
    expected = '{"positive": ..., "negative": ...}, each a text or a list of {"role", "content"}'
    return json_lines(path, lambda pair: (prompt_of(pair["positive"]), prompt_of(pair["negative"])), expected)


def run(args: argparse.Namespace) -> int:
    options = {**given(args, "site", "pooling", "holdout_fraction", "seed"), **naming_options(args, args.name)}
    if args.layers != "all":
        options["layers"] = args.layers
    result = job_outcome(args, Client.extract_vectors, requests.extract_vectors, args.pairs, args.method, **options)
    if result is None:
        return 0
    if args.json:
        print_json(result)
        return 0
    table(
        (
            "layer",
            "held-out accuracy",
            "random direction",
            "norm",
            "activation norm",
            "explained variance",
            "midpoint",
            "margin",
            "tokens of positives",
            "tokens of negatives",
            "participation ratio",
            "tokens left out",
        ),
        [
            (
                f"{layer.layer}{' *' if layer.layer == result.best_layer else ''}",
                f"{layer.heldout_accuracy:.3f}",
                f"{layer.random_accuracy:.3f}",
                f"{layer.norm:.3f}",
                f"{layer.activation_norm:.3f}",
                f"{layer.explained_variance:.3f}",
                f"{layer.midpoint:.3f}",
                f"{layer.margin:.2f}",
                _middle(layer.positive_tokens),
                _middle(layer.negative_tokens),
                f"{layer.participation_ratio:.1f}",
                f"{layer.tokens_left_out} of {layer.pooled_tokens + layer.tokens_left_out}",
            )
            for layer in result.layers
        ],
    )
    for warning in result.warnings:
        note(f"warning: {warning}")
    note_stored(result.artifact, args.name, f"; best layer {result.best_layer}")
    return 0


def _middle(tokens: TokenProjections | None) -> str:
    """Returns between what the projections of nine tokens in ten lie."""
    return "" if tokens is None else f"{tokens.p05:.2f} to {tokens.p95:.2f}"


def prompt_of(value: object) -> PromptLike:
    """Returns a prompt of a line of JSON. Raises ValueError for what is neither a text nor a list of chat messages."""
    if isinstance(value, str):
        return value
    if isinstance(value, list) and value and all(map(_is_turn, value)):
        return cast(Messages, value)
    raise ValueError(value)


def _is_turn(turn: dict[str, object]) -> bool:
    return set(turn) == {"role", "content"} and all(isinstance(text, str) for text in turn.values())
