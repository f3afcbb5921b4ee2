"""patchclamp vectors circuit"""

import argparse
import math

from patchclamp import requests
from patchclamp.cli.detach import add_detach_argument, job_outcome
from patchclamp.cli.extract import prompt_of
from patchclamp.cli.files import json_lines
from patchclamp.cli.naming import add_naming_arguments, naming_options, note_stored
from patchclamp.cli.neurons.shown import add_picture_argument, show_best, write_picture
from patchclamp.cli.options import add_model_argument, connection_options, given
from patchclamp.cli.parser import count, seed
from patchclamp.cli.steering import layer_list
from patchclamp.cli.terminal import note, print_json, table
from patchclamp.client import Client
from patchclamp.names import POOLINGS, SITES
from patchclamp.pictures.steering import concept_circuit_figure
from patchclamp.requests import PromptLike
from patchclamp.results import FoundConceptCircuit


def add_parser(actions: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    parser = actions.add_parser(
        "circuit",
        parents=[connection_options(timeout=math.inf)],
        help="find a concept's direction in any context, and the neurons and heads that write it",
    )
    parser.add_argument("name", help="stored are NAME-vector, NAME-neurons and NAME-heads")
    parser.add_argument(
        "--scenarios",
        type=scenarios_file,
        required=True,
        metavar="FILE",
        help='a line for each context: {"joy": [...], "fear": [...]}, texts by value of the concept',
    )
    parser.add_argument("--target", required=True, metavar="VALUE", help="whose direction is sought")
    parser.add_argument("--site", choices=SITES)
    parser.add_argument("--layers", type=layer_list, default="all", help="such as 8-12 (default: %(default)s)")
    parser.add_argument("--pooling", choices=POOLINGS)
    parser.add_argument("--holdout-fraction", type=float, metavar="SHARE", help="of the scenarios (default: 0.25)")
    parser.add_argument("--neurons", type=count, metavar="N", help="at most so many (default: 100)")
    parser.add_argument("--heads", type=count, metavar="N", help="at most so many (default: 10)")
    parser.add_argument("--random-sets", type=count, metavar="N", help="zeroed beside them (default: 10)")
    parser.add_argument("--seed", type=seed)
    add_naming_arguments(parser)
    add_model_argument(parser)
    add_picture_argument(parser, "picture of what is written by layer, and of what zeroing leaves")
    add_detach_argument(parser)
    parser.set_defaults(run=run)


def scenarios_file(path: str) -> list[dict[str, list[PromptLike]]]:
    """Returns the texts by value of every line that is not blank."""

    def scenario(line: dict[str, object]) -> dict[str, list[PromptLike]]:
        return {value: _texts(texts) for value, texts in line.items()}

    return json_lines(path, scenario, 'texts by value, {"joy": [...], "fear": [...]}: one text or a list of several')


def _texts(texts: object) -> list[PromptLike]:
    if isinstance(texts, list) and texts:
        return [prompt_of(each) for each in texts]
    return [prompt_of(texts)]


def run(args: argparse.Namespace) -> int:
    own = ("site", "pooling", "holdout_fraction", "neurons", "heads", "random_sets", "seed", "model")
    options = {**given(args, *own), **naming_options(args, args.name)}
    if args.layers != "all":
        options["layers"] = args.layers
    result = job_outcome(
        args, Client.find_concept_circuit, requests.find_concept_circuit, args.scenarios, args.target, **options
    )
    if result is not None:
        show(args, result)
    return 0


def show(args: argparse.Namespace, result: FoundConceptCircuit) -> None:
    if args.json:
        print_json(result)
    else:
        _show(result)
    if args.picture is not None:
        target = result.vector.provenance["target"]
        write_picture(args, concept_circuit_figure(result, f"{target} at layer {result.best_layer}"))


def _show(result: FoundConceptCircuit) -> None:
    table(
        ("layer", "held-out accuracy", "random direction", "norm", "activation norm", "margin"),
        [
            (
                f"{each.layer}{' *' if each.layer == result.best_layer else ''}",
                f"{each.heldout_accuracy:.3f}",
                f"{each.random_accuracy:.3f}",
                f"{each.norm:.3f}",
                f"{each.activation_norm:.3f}",
                f"{each.margin:.2f}",
            )
            for each in result.layers
        ],
    )
    show_best(result.neurons, "writes")
    table(("head", "writes"), [(str(each.head), f"{each.score:.4f}") for each in result.best_heads])
    rows = [("nothing", f"{result.separation:.3f}", "", f"{result.projection:.3f}")]
    for part, zeroed in result.zeroed.items():
        random = f"{zeroed.random_separation:.3f} ({min(zeroed.random_separations):.3f} at least)"
        rows.append((part, f"{zeroed.separation:.3f}", random, f"{zeroed.projection:.3f}"))
    table(("zeroed", "held-out separation", "random sets", "projection"), rows)
    for warning in result.warnings:
        note(f"warning: {warning}")
    note_stored(result.vector, f"; best layer {result.best_layer}")
    for artifact in (result.neurons.artifact, result.heads):
        note_stored(artifact)
