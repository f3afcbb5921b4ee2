"""patchclamp heads circuit"""

import argparse
import math
from typing import cast

from patchclamp import requests
from patchclamp.cli.files import json_lines, text_of
from patchclamp.cli.heads.scores import add_heat_map_argument, show_scores, write_heat_map
from patchclamp.cli.jobs import add_detach_argument, detach
from patchclamp.cli.naming import add_replace_argument, note_moved
from patchclamp.cli.numbers import count, seed
from patchclamp.cli.options import connect, connection_options, given
from patchclamp.cli.terminal import job_result, note, print_json
from patchclamp.heads import CleanCorruptPair
from patchclamp.names import CIRCUIT_METHODS
from patchclamp.requests import CircuitOptions
from patchclamp.results import score_matrix

_FIELDS = ("clean", "corrupt", "clean_answer", "corrupt_answer")


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
    parser.add_argument("--description")
    add_replace_argument(parser)
    add_detach_argument(parser)
    parser.add_argument("--model", default="", help="default: the server's model")
    add_heat_map_argument(parser)
    parser.set_defaults(run=run)


def clean_corrupt_file(path: str) -> list[CleanCorruptPair]:
    expected = ", ".join(f'"{name}": ...' for name in _FIELDS)
    return json_lines(
        path,
        lambda line: CleanCorruptPair(
            text_of(line, "clean"),
            text_of(line, "corrupt"),
            text_of(line, "clean_answer"),
            text_of(line, "corrupt_answer"),
        ),
        f"{{{expected}}}, each a text",
    )


def run(args: argparse.Namespace) -> int:
    chosen = given(args, "circuit_size", "random_sets", "seed", "description")
    options = cast(CircuitOptions, {**chosen, "tags": [args.name], "replace_tags": args.replace, "model": args.model})
    if args.detach:
        return detach(args, requests.find_circuit(args.pairs, args.method, **options))
    with (
        connect(args) as client,
        client.find_circuit(args.pairs, args.method, timeout=args.timeout, **options) as stream,
    ):
        result = job_result(stream, quiet=args.json)
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
        note_moved(result.artifact)
        note(f"stored as {args.name} = {result.artifact.id}")
    write_heat_map(args, score_matrix(result.effects), f"effect by {args.method}")
    return 0
