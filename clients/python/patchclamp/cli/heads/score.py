"""patchclamp heads score"""

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
from patchclamp.heads import TemporalFact
from patchclamp.names import HEAD_SCORE_METHODS
from patchclamp.requests import HeadScoreOptions
from patchclamp.results import score_matrix


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
    parser.add_argument("--description")
    add_replace_argument(parser)
    add_detach_argument(parser)
    parser.add_argument("--model", default="", help="default: the server's model")
    add_heat_map_argument(parser)
    parser.set_defaults(run=run)


def facts_file(path: str) -> list[TemporalFact]:
    return json_lines(
        path,
        lambda line: TemporalFact(text_of(line, "prompt"), text_of(line, "answer"), _truth(line["time_conditioned"])),
        '{"prompt": ..., "answer": ..., "time_conditioned": true or false}',
    )


def run(args: argparse.Namespace) -> int:
    options = given(args, "ngram", "sequence_tokens", "sequences", "seed", "facts", "description", "model")
    if args.name is not None:
        options |= {"tags": [args.name], "replace_tags": args.replace}
    if args.detach:
        return detach(args, requests.score_heads(args.method, **cast(HeadScoreOptions, options)))
    with (
        connect(args) as client,
        client.score_heads(args.method, timeout=args.timeout, **cast(HeadScoreOptions, options)) as stream,
    ):
        result = job_result(stream, quiet=args.json)
    if args.json:
        print_json(result)
    else:
        show_scores(result.scores, args.method)
        note_moved(result.artifact)
        note(f"stored as {args.name or 'no tag'} = {result.artifact.id}")
    write_heat_map(args, score_matrix(result.scores), args.method)
    return 0


def _truth(value: object) -> bool:
    if not isinstance(value, bool):
        raise ValueError("neither true nor false")
    return value
