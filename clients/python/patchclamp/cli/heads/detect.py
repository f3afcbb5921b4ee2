"""patchclamp heads detect"""

import argparse
import math
from typing import cast

from patchclamp import requests
from patchclamp.cli.files import picture_file
from patchclamp.cli.heads.drawing import needle_grid_lines
from patchclamp.cli.heads.needles import add_needle_arguments, needle_test
from patchclamp.cli.heads.scores import add_heat_map_argument, print_lines, show_scores, write_heat_map
from patchclamp.cli.jobs import add_detach_argument, detach
from patchclamp.cli.naming import add_replace_argument, note_moved
from patchclamp.cli.options import connect, connection_options, given
from patchclamp.cli.settings import settings
from patchclamp.cli.terminal import job_result, note, print_json
from patchclamp.heads import StoppingRule
from patchclamp.pictures.heads import needle_grid_figure
from patchclamp.requests import DetectOptions
from patchclamp.results import NeedleGrid, RetrievalHeads, score_matrix


def add_parser(actions: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    parser = actions.add_parser(
        "detect",
        parents=[connection_options(timeout=math.inf)],
        help="find retrieval heads with needles hidden in text",
    )
    parser.add_argument("name", help="tag to store the head set under")
    add_needle_arguments(parser)
    parser.add_argument("--threshold", type=float, help="score of a retrieval head (default: 0.1)")
    parser.add_argument(
        "--stop",
        dest="stopping",
        type=stopping_rule,
        metavar="on|SETTING,...",
        help="stop once the ranking is stable, as in top_k=10,agreement=.9,window=6,min_successes=12",
    )
    parser.add_argument("--description")
    add_replace_argument(parser)
    add_detach_argument(parser)
    parser.add_argument("--model", default="", help="default: the server's model")
    add_heat_map_argument(parser)
    parser.add_argument("--grid", type=picture_file, metavar="OUT.png", help="picture of success by length and depth")
    parser.set_defaults(run=run)


def stopping_rule(text: str) -> StoppingRule:
    """ "on", or settings such as top_k=10,window=6"""
    accepted = {"top_k": int, "agreement": float, "window": int, "min_successes": int}
    return StoppingRule() if text == "on" else StoppingRule(**settings(text, accepted))


def run(args: argparse.Namespace) -> int:
    chosen = given(args, "threshold", "stopping", "description")
    options = cast(DetectOptions, {**chosen, "tags": [args.name], "replace_tags": args.replace, "model": args.model})
    if args.detach:
        return detach(args, requests.detect_retrieval_heads(needle_test(args), **options))
    with (
        connect(args) as client,
        client.detect_retrieval_heads(needle_test(args), timeout=args.timeout, **options) as stream,
    ):
        result = job_result(stream, quiet=args.json)
    grid = NeedleGrid.of(result.runs)
    if args.json:
        print_json(result)
    else:
        _show(result, grid)
        note_moved(result.artifact)
        note(f"stored as {args.name} = {result.artifact.id}")
    write_heat_map(args, score_matrix(result.scores), "retrieval score")
    if args.grid is not None:
        needle_grid_figure(grid, "needles found").savefig(args.grid)
        note(f"needle grid: {args.grid}")
    return 0


def _show(result: RetrievalHeads, grid: NeedleGrid) -> None:
    early = ", stopped early" if result.stopped_early else ""
    print(f"{result.successes} of {len(result.runs)} needles found{early}")
    above = sum(score.score >= result.threshold for score in result.scores)
    print(
        f"{above} heads ({result.fraction_above_threshold:.1%}) score at least {result.threshold:g}; "
        f"stability of the ten best {result.stability:.2f}"
    )
    print()
    show_scores(result.scores, "retrieval score")
    print()
    print_lines(needle_grid_lines(grid))
