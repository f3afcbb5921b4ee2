"""patchclamp sparsity plot"""

import argparse
from pathlib import Path

from patchclamp.cli.files import not_empty, parsed_file, picture_file
from patchclamp.cli.options import output_options
from patchclamp.cli.terminal import note, print_json
from patchclamp.pictures.quality import Series, quality_figure, series_of


def add_parser(actions: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    parser = actions.add_parser(
        "plot", parents=[output_options()], help="picture of quality against bytes read and speed, by policy"
    )
    parser.add_argument(
        "results",
        type=series_file,
        metavar="RESULTS.json",
        help="what `sparsity evaluate --json` or benchmarks/sparse wrote",
    )
    parser.add_argument("picture", type=picture_file, metavar="OUT.png", help="png, svg or pdf; needs matplotlib")
    parser.set_defaults(run=run)


def series_file(path: str) -> Series:
    return parsed_file(path, lambda text: series_of(not_empty(text)))


def run(args: argparse.Namespace) -> int:
    picture: Path = args.picture
    series: Series = args.results
    quality_figure(series).savefig(picture)
    if args.json:
        print_json({"picture": str(picture), "points": {name: len(points) for name, points in series.items()}})
    else:
        note(f"{picture}: {len(series)} policies")
    return 0
