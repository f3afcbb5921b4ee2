"""patchclamp features search"""

import argparse
import math
from typing import Any

from patchclamp import requests
from patchclamp.cli.detach import add_detach_argument, job_outcome
from patchclamp.cli.neurons.shown import tokens_shown
from patchclamp.cli.neurons.texts import add_text_arguments, texts_of
from patchclamp.cli.options import add_model_argument, connection_options, given
from patchclamp.cli.parser import count
from patchclamp.cli.terminal import note, print_json, table
from patchclamp.client import Client
from patchclamp.results import FoundFeatures

# Tokens of a row of the table.
_TOKENS = 5


def add_parser(actions: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    parser = actions.add_parser(
        "search",
        parents=[connection_options(timeout=math.inf)],
        help="features by labelled texts, tokens, a direction or their names",
    )
    parser.add_argument("autoencoder", help="id or tag")
    way = parser.add_mutually_exclusive_group(required=True)
    way.add_argument("--target", metavar="LABEL", help="label of the texts that they are active on")
    way.add_argument("--token", action="append", metavar="TOKEN", help="token that they are active at; repeatable")
    way.add_argument("--direction", metavar="VECTOR", help="id or tag of a vector that they write along")
    way.add_argument("--label", metavar="TEXT", help="part of their name, in --labels")
    parser.add_argument("--contrast", metavar="LABEL", help="beside --target: compare with it (default: all others)")
    parser.add_argument("--labels", metavar="LABELS", help="id or tag of names of features")
    parser.add_argument("--top", type=count, default=0, metavar="K", help="how many (default: 20)")
    add_text_arguments(parser, required=False)
    add_model_argument(parser)
    add_detach_argument(parser)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    options: dict[str, Any] = {
        **given(args, "target", "contrast", "direction", "label", "labels", "model"),
        "tokens": args.token,
        "top_k": args.top,
    }
    if args.target is not None or args.token is not None:
        options["texts"] = texts_of(args)
    elif (args.texts, args.corpus, args.data) != (None, None, None):
        raise ValueError("texts are for --target and --token")
    found = job_outcome(args, Client.search_features, requests.search_features, args.autoencoder, **options)
    if found is None:
        return 0
    if args.json:
        print_json(found)
    else:
        show(args, found)
    return 0


def show(args: argparse.Namespace, found: FoundFeatures) -> None:
    """Prints the features in a table, and what was measured on the texts."""
    texts = found.tokens > 0
    rows = [
        (
            each.feature,
            f"{each.score:.4g}",
            *((f"{each.target_mean:.4g}", f"{each.contrast_mean:.4g}", f"{each.rate:.2%}") if texts else ()),
            each.label or "-",
            tokens_shown(each.promotes[:_TOKENS]),
        )
        for each in found.features
    ]
    table(("feature", "score", *(("mean", "of others", "active") if texts else ()), "name", "makes likelier"), rows)
    if texts:
        print(
            f"{found.tokens:,} tokens: {found.active_features:,} features were active, {found.mean_active:.1f} at a "
            f"token; the reconstruction explains {found.explained_variance:.1%} of the variance"
        )
        if found.explained_variance < 0:
            note("warning: the reconstruction is further off than the mean: is the autoencoder of this model and site?")
