"""patchclamp heads circuit"""

import argparse
import math

from patchclamp import requests
from patchclamp.cli.detach import add_detach_argument, job_outcome
from patchclamp.cli.files import json_texts
from patchclamp.cli.heads.scores import add_heat_map_argument, show_scores, write_heat_map
from patchclamp.cli.naming import add_naming_arguments, naming_options, note_stored
from patchclamp.cli.options import add_model_argument, connection_options, given
from patchclamp.cli.parser import count, seed
from patchclamp.cli.terminal import print_json
from patchclamp.client import Client
from patchclamp.heads import CleanCorruptPair
from patchclamp.names import CIRCUIT_METHODS
from patchclamp.results import Circuit, score_matrix


def add_parser(actions: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    parser = actions.add_parser(
        "circuit",
        parents=[connection_options(timeout=math.inf)],
        help="rank heads by their effect on clean/corrupt pairs",
    )
    parser.add_argument("name", help="tag to store the effects under, as a head set")
    parser.add_argument(
        "--pairs",
        type=clean_corrupt_file,
        required=True,
        metavar="FILE",
        help='lines of {"clean": ..., "corrupt": ..., "clean_answer": ..., "corrupt_answer": ...}',
    )
    parser.add_argument("--method", choices=CIRCUIT_METHODS, default="activation_patching", help="default: %(default)s")
    parser.add_argument("--circuit-size", type=count, metavar="N", help="heads whose faithfulness is reported")
    parser.add_argument("--random-sets", type=count, metavar="N", help="random circuits of equal size")
    parser.add_argument("--seed", type=seed)
    add_naming_arguments(parser)
    add_detach_argument(parser)
    add_model_argument(parser)
    add_heat_map_argument(parser)
    parser.set_defaults(run=run)


def clean_corrupt_file(path: str) -> list[CleanCorruptPair]:
    return json_texts(path, CleanCorruptPair, "clean", "corrupt", "clean_answer", "corrupt_answer")


def run(args: argparse.Namespace) -> int:
    options = {**given(args, "circuit_size", "random_sets", "seed", "model"), **naming_options(args, args.name)}
    result = job_outcome(args, Client.find_circuit, requests.find_circuit, args.pairs, args.method, **options)
    if result is not None:
        show(args, result)
    return 0


def show(args: argparse.Namespace, result: Circuit) -> None:
    if args.json:
        print_json(result)
    else:
        show_scores(result.effects, "effect")
        print()
        print(f"logit(clean answer) - logit(corrupt answer): {result.clean_metric:.3f} clean, ", end="")
        print(f"{result.corrupt_metric:.3f} corrupt")
        print(
            f"faithfulness {result.faithfulness:.3f}; of random circuits {result.random_faithfulness_mean:.3f} "
            f"± {result.random_faithfulness_deviation:.3f}"
        )
        note_stored(result.artifact)
    write_heat_map(args, score_matrix(result.effects), f"effect by {args.method}")
