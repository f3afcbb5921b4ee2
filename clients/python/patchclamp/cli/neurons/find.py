"""patchclamp neurons find"""

import argparse
import math
from collections.abc import Sequence

from patchclamp import requests
from patchclamp.cli.detach import add_detach_argument, job_outcome
from patchclamp.cli.naming import add_naming_arguments, naming_options
from patchclamp.cli.neurons.drawing import layer_lines
from patchclamp.cli.neurons.selection import add_layers_argument, layers_of
from patchclamp.cli.neurons.shown import (
    add_picture_argument,
    note_stored_set,
    show_best,
    tokens_shown,
    write_picture,
)
from patchclamp.cli.options import add_model_argument, connection_options, given
from patchclamp.cli.parser import count
from patchclamp.cli.terminal import note, print_json
from patchclamp.client import Client
from patchclamp.pictures.neurons import layer_scores_figure
from patchclamp.results import FoundNeurons


def add_parser(actions: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    parser = actions.add_parser(
        "find",
        parents=[connection_options(timeout=math.inf)],
        help="neurons that write in favour of words, or along a vector",
    )
    parser.add_argument("words", nargs="*", metavar="WORD", help="one, or several together")
    parser.add_argument("--vector", metavar="VECTOR", help="instead of words: id or tag of a direction")
    parser.add_argument("--name", help="tag to store the set under")
    add_layers_argument(parser)
    parser.add_argument("--top", type=count, default=0, metavar="K", help="neurons of the set (default: 20)")
    parser.add_argument("--value", type=float, help="size of the value stored with each neuron (default: 20)")
    add_naming_arguments(parser)
    add_detach_argument(parser)
    add_model_argument(parser)
    add_picture_argument(parser, "picture of the best score of each layer")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    tags = () if args.name is None else (args.name,)
    options = {
        **given(args, "vector", "value", "model"),
        "layers": layers_of(args),
        "top_k": args.top,
        **naming_options(args, *tags),
    }
    result = job_outcome(args, Client.find_neurons, requests.find_neurons, args.words or None, **options)
    if result is not None:
        show(args, result)
    return 0


def show(args: argparse.Namespace, result: FoundNeurons) -> None:
    layers, largest = best_by_layer(result)
    if args.json:
        print_json(result)
    else:
        show_best(result.found, "|cosine|" if args.vector else "|z|")
        print()
        for line in layer_lines(layers, largest):
            print(line)
        if result.tokens:
            note(f"first tokens, which alone are sought: {tokens_shown(result.tokens)}")
        note_stored_set(result.found)
    if args.picture is not None:
        title = f"neurons of {args.vector or ', '.join(args.words)}"
        write_picture(args, layer_scores_figure(layers, largest, (), title))


def best_by_layer(result: FoundNeurons) -> tuple[Sequence[int], Sequence[float]]:
    """Returns the layers that have any of the neurons, and the best score in each."""
    best: dict[int, float] = {}
    for each in result.found.best:
        best[each.neuron.layer] = max(each.score, best.get(each.neuron.layer, each.score))
    layers = sorted(best)
    return layers, [best[layer] for layer in layers]
