"""patchclamp heads detect"""

import argparse
import math

from patchclamp import requests
from patchclamp.cli.detach import add_detach_argument, job_outcome
from patchclamp.cli.files import picture_file
from patchclamp.cli.heads.drawing import needle_grid_lines
from patchclamp.cli.heads.needles import add_needle_arguments, needle_test
from patchclamp.cli.heads.scores import add_heat_map_argument, print_lines, show_scores, write_heat_map
from patchclamp.cli.naming import add_naming_arguments, naming_options, note_stored
from patchclamp.cli.options import add_model_argument, connection_options, given
from patchclamp.cli.settings import settings
from patchclamp.cli.terminal import note, print_json
from patchclamp.client import Client
from patchclamp.heads import StoppingRule
from patchclamp.pictures.heads import needle_grid_figure
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
    add_naming_arguments(parser)
    add_detach_argument(parser)
    add_model_argument(parser)
    add_heat_map_argument(parser)
    parser.add_argument("--grid", type=picture_file, metavar="OUT.png", help="picture of success by length and depth")
    parser.set_defaults(run=run)


def stopping_rule(text: str) -> StoppingRule:
    """Reads "on", or settings such as top_k=10,window=6."""
    accepted = {"top_k": int, "agreement": float, "window": int, "min_successes": int}
    return StoppingRule() if text == "on" else StoppingRule(**settings(text, accepted))


def run(args: argparse.Namespace) -> int:
    options = {**given(args, "threshold", "stopping", "model"), **naming_options(args, args.name)}
    result = job_outcome(
        args, Client.detect_retrieval_heads, requests.detect_retrieval_heads, needle_test(args), **options
    )
    if result is not None:
        show(args, result)
    return 0


def show(args: argparse.Namespace, result: RetrievalHeads) -> None:
    grid = NeedleGrid.of(result.runs)
    if args.json:
        print_json(result)
    else:
        _show(result, grid)
        note_stored(result.artifact)
    write_heat_map(args, score_matrix(result.scores), "retrieval score")
    if args.grid is not None:
        needle_grid_figure(grid, "needles found").savefig(args.grid)
        note(f"needle grid: {args.grid}")


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
