"""patchclamp heads score"""

import argparse
import math

from patchclamp import requests
from patchclamp.cli.detach import add_detach_argument, job_outcome
from patchclamp.cli.files import json_lines, text_of
from patchclamp.cli.heads.scores import add_heat_map_argument, show_scores, write_heat_map
from patchclamp.cli.naming import add_naming_arguments, naming_options, note_stored
from patchclamp.cli.options import add_model_argument, connection_options, given
from patchclamp.cli.parser import count, seed
from patchclamp.cli.terminal import print_json
from patchclamp.client import Client
from patchclamp.heads import TemporalFact
from patchclamp.names import HEAD_SCORE_METHODS
from patchclamp.results import ScoredHeads, score_matrix


def add_parser(actions: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    parser = actions.add_parser(
        "score", parents=[connection_options(timeout=math.inf)], help="score every head by a method"
    )
    parser.add_argument("method", choices=HEAD_SCORE_METHODS)
    parser.add_argument("name", nargs="?", help="tag to store the head set under")
    parser.add_argument("--ngram", type=count, metavar="N", help="of ngram: tokens that have to match (default: 2)")
    parser.add_argument("--sequence-tokens", type=count, metavar="N", help="before a random sequence repeats")
    parser.add_argument("--sequences", type=count, metavar="N", help="how many of them")
    parser.add_argument("--seed", type=seed)
    parser.add_argument(
        "--facts",
        type=facts_file,
        metavar="FILE",
        help='of temporal: lines of {"prompt": ..., "answer": ..., "time_conditioned": true}',
    )
    add_naming_arguments(parser)
    add_detach_argument(parser)
    add_model_argument(parser)
    add_heat_map_argument(parser)
    parser.set_defaults(run=run)


def facts_file(path: str) -> list[TemporalFact]:
    return json_lines(
        path,
        lambda line: TemporalFact(text_of(line, "prompt"), text_of(line, "answer"), _truth(line["time_conditioned"])),
        '{"prompt": ..., "answer": ..., "time_conditioned": true or false}',
    )


def run(args: argparse.Namespace) -> int:
    tags = () if args.name is None else (args.name,)
    options = given(args, "ngram", "sequence_tokens", "sequences", "seed", "facts", "model")
    options |= naming_options(args, *tags)
    result = job_outcome(args, Client.score_heads, requests.score_heads, args.method, **options)
    if result is not None:
        show(args, result)
    return 0


def show(args: argparse.Namespace, result: ScoredHeads) -> None:
    if args.json:
        print_json(result)
    else:
        show_scores(result.scores, args.method)
        note_stored(result.artifact)
    write_heat_map(args, score_matrix(result.scores), args.method)


def _truth(value: object) -> bool:
    if not isinstance(value, bool):
        raise ValueError("neither true nor false")
    return value
