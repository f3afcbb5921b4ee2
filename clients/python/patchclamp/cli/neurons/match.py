"""patchclamp neurons match"""

import argparse
import math

from patchclamp import requests
from patchclamp.cli.detach import add_detach_argument, job_outcome
from patchclamp.cli.naming import add_naming_arguments, naming_options
from patchclamp.cli.neurons.selection import add_layers_argument, add_top_k_argument, layers_of, neurons
from patchclamp.cli.neurons.shown import SHOWN, note_stored_set
from patchclamp.cli.neurons.texts import add_text_arguments, texts_of
from patchclamp.cli.options import add_model_argument, connection_options, given
from patchclamp.cli.parser import seed
from patchclamp.cli.terminal import print_json, table
from patchclamp.client import Client
from patchclamp.results import MatchedNeurons


def add_parser(actions: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    parser = actions.add_parser(
        "match",
        parents=[connection_options(timeout=math.inf)],
        help="neurons of another checkpoint that do the same",
    )
    parser.add_argument("other", help="name of the checkpoint, as the server's --match-model gives it")
    add_text_arguments(parser)
    parser.add_argument("--neurons", type=neurons, metavar="NEURONS|NEURON_SET", help="default: all of --layers")
    add_top_k_argument(parser)
    add_layers_argument(parser)
    parser.add_argument("--any-layer", action="store_true", help="look in every layer, not in that of the same index")
    parser.add_argument("--seed", type=seed, default=0)
    parser.add_argument("--name", help="tag to store the matches under, as a set of the other model")
    add_naming_arguments(parser)
    add_detach_argument(parser)
    add_model_argument(parser)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    tags = () if args.name is None else (args.name,)
    options = {
        **given(args, "neurons", "model"),
        "top_k": args.top,
        "layers": layers_of(args),
        "any_layer": args.any_layer,
        "seed": args.seed,
        **naming_options(args, *tags),
    }
    arguments = (args.other, texts_of(args))
    matched = job_outcome(args, Client.match_neurons, requests.match_neurons, *arguments, **options)
    if matched is not None:
        show(args, matched)
    return 0


def show(args: argparse.Namespace, matched: MatchedNeurons) -> None:
    if args.json:
        print_json(matched)
        return
    rows = [
        (each.neuron, each.other, f"{each.correlation:.4f}", "mutual" if each.mutual else "")
        for each in matched.matches[:SHOWN]
    ]
    table(("neuron", f"of {args.other}", "correlation", ""), rows)
    print(
        f"{matched.mutual} of {matched.neurons} matched mutually over {matched.tokens:,} tokens; mean correlation "
        f"{matched.mean_correlation:.4f}, with shuffled tokens {matched.shuffled_mean_correlation:.4f}"
    )
    note_stored_set(matched.ported)
