"""patchclamp neurons decode"""

import argparse
import math

from patchclamp import requests
from patchclamp.cli.detach import add_detach_argument, job_outcome
from patchclamp.cli.neurons.selection import add_layers_argument, add_neurons_argument, layers_of
from patchclamp.cli.neurons.shown import tokens_shown
from patchclamp.cli.options import add_model_argument, connection_options
from patchclamp.cli.parser import count
from patchclamp.cli.terminal import print_json, table
from patchclamp.client import Client
from patchclamp.names import NEURON_WEIGHTS
from patchclamp.results import DecodedNeuron


def add_parser(actions: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    parser = actions.add_parser(
        "decode",
        parents=[connection_options(timeout=math.inf)],
        help="tokens that the weights of neurons stand for; no text is run",
    )
    add_neurons_argument(parser, optional=True)
    add_layers_argument(parser)
    parser.add_argument("--weights", choices=NEURON_WEIGHTS, nargs="+", default=[], help="default: all of the model")
    parser.add_argument("--tokens", type=count, default=0, metavar="N", help="of each row and side (default: 10)")
    add_detach_argument(parser)
    add_model_argument(parser)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    options = {
        "top_k": args.top,
        "layers": layers_of(args),
        "weights": args.weights,
        "tokens": args.tokens,
        "model": args.model,
    }
    decoded = job_outcome(args, Client.decode_neurons, requests.decode_neurons, args.neurons, **options)
    if decoded is not None:
        show(args, decoded)
    return 0


def show(args: argparse.Namespace, decoded: tuple[DecodedNeuron, ...]) -> None:
    if args.json:
        print_json(decoded)
        return
    table(
        ("neuron", "weights", "z", "largest", "lowest z", "smallest"),
        [
            (
                each.neuron,
                row.weights,
                f"{row.top_z:+.1f}",
                tokens_shown(row.top),
                f"{row.bottom_z:+.1f}",
                tokens_shown(row.bottom),
            )
            for each in decoded
            for row in each.rows
        ],
    )
