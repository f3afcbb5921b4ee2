"""Head scores in the terminal, as a table of the best and a heat map of all; and as a picture."""

import argparse
from collections.abc import Iterable, Sequence

from patchclamp.cli.files import picture_file
from patchclamp.cli.heads.drawing import heat_map_lines
from patchclamp.cli.terminal import note, table
from patchclamp.pictures.heads import heat_map_figure
from patchclamp.results import HeadScore, score_matrix

SHOWN = 10


def add_heat_map_argument(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--heatmap", type=picture_file, metavar="OUT.png", help="picture of layers x heads; needs matplotlib"
    )


def show_scores(scores: Sequence[HeadScore], what: str) -> None:
    """Prints the best heads, with intervals where the method has any, and all heads as a heat map."""
    intervals = any(score.low is not None for score in scores)
    header = ("head", what, *(["95 % interval"] if intervals else []), "")
    rows = [
        (
            score.head,
            f"{score.score:.4f}",
            *([f"{score.low:.4f} to {score.high:.4f}" if score.low is not None else ""] if intervals else []),
            "always on" if score.always_on else "",
        )
        for score in scores[:SHOWN]
    ]
    table(header, rows)
    show_heat_map(score_matrix(scores))


def show_heat_map(matrix: Sequence[Sequence[float]]) -> None:
    print()
    print_lines(heat_map_lines(matrix))


def write_heat_map(args: argparse.Namespace, matrix: Sequence[Sequence[float]], title: str) -> None:
    """Writes a picture of the scores where --heatmap asks for one."""
    if args.heatmap is not None:
        heat_map_figure(matrix, title).savefig(args.heatmap)
        note(f"heat map: {args.heatmap}")


def print_lines(lines: Iterable[str]) -> None:
    for line in lines:
        print(line.rstrip())
