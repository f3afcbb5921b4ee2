"""patchclamp activations patch"""

import argparse
import math
from typing import Any

from patchclamp import requests
from patchclamp.cli.detach import add_detach_argument, job_outcome
from patchclamp.cli.files import json_lines, text_of
from patchclamp.cli.heads.drawing import heat_map_lines
from patchclamp.cli.heads.scores import print_lines
from patchclamp.cli.neurons.shown import add_picture_argument, write_picture
from patchclamp.cli.options import add_model_argument, connection_options, given
from patchclamp.cli.parser import count, seed
from patchclamp.cli.steering import layer_list
from patchclamp.cli.terminal import note, print_json, table
from patchclamp.client import Client
from patchclamp.names import PATCH_DIRECTIONS, PATCH_METRICS, SITES
from patchclamp.patching import PatchPair, PositionsLike
from patchclamp.pictures.patching import patching_figure
from patchclamp.results import PatchGrid

SHOWN = 10


def add_parser(actions: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    parser = actions.add_parser(
        "patch",
        parents=[connection_options(timeout=math.inf)],
        help="run one prompt of each pair with single activations of the other, and measure what that does",
    )
    parser.add_argument(
        "pairs",
        type=pair_file,
        metavar="FILE",
        help='lines of {"clean": ..., "corrupt": ..., "answer": ..., "other_answer": ...}; a metric may need fewer',
    )
    parser.add_argument("--direction", choices=PATCH_DIRECTIONS, help="default: restore, clean into corrupt")
    parser.add_argument("--metric", choices=PATCH_METRICS, help="default: log_probability_difference")
    parser.add_argument("--sites", choices=SITES, nargs="+", default=[], help="default: resid_pre attn_out mlp_out")
    parser.add_argument("--layers", type=layer_list, nargs="+", default=[], help="such as 0,10-12 (default: all)")
    parser.add_argument("--layer-window", type=count, metavar="N", help="neighbouring layers patched together")
    parser.add_argument(
        "--positions",
        type=column,
        nargs="+",
        default=[],
        metavar="NAME=START[:END]",
        help="tokens patched together, negative from the end, such as last=-1 or start=0:4; default: each for itself",
    )
    parser.add_argument("--by-head", action="store_true", help="at attn_z, every head for itself too")
    parser.add_argument("--seed", type=seed, help="of the intervals")
    add_model_argument(parser)
    add_picture_argument(parser, "heat maps of layers x positions")
    add_detach_argument(parser)
    parser.set_defaults(run=run)


def pair_file(path: str) -> list[PatchPair]:
    def parse(line: dict[str, object]) -> PatchPair:
        if not set(line) <= {"clean", "corrupt", "answer", "other_answer"}:
            raise ValueError
        answers = (text_of(line, name) if name in line else "" for name in ("answer", "other_answer"))
        return PatchPair(text_of(line, "clean"), text_of(line, "corrupt"), *answers)

    return json_lines(path, parse, '{"clean": ..., "corrupt": ..., "answer": ..., "other_answer": ...}, each a text')


def column(text: str) -> tuple[str, PositionsLike]:
    """Reads NAME=START or NAME=START:END, where an END that is left out is that of the prompt."""
    name, equals, where = text.partition("=")
    start, colon, end = where.partition(":")
    try:
        if not name or not equals:
            raise ValueError
        return (name, (int(start), int(end) if end else None)) if colon else (name, int(start))
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r}: expected NAME=START or NAME=START:END, such as last=-1") from None


def run(args: argparse.Namespace) -> int:
    options: dict[str, Any] = given(args, "direction", "metric", "layer_window", "seed", "model")
    options |= {
        "sites": args.sites,
        "layers": layers_of(args),
        "positions": dict(args.positions),
        "by_head": args.by_head,
    }
    grid = job_outcome(args, Client.patch_activations, requests.patch_activations, args.pairs, **options)
    if grid is None:
        return 0
    if args.json:
        print_json(grid)
        draw(args, grid)
    else:
        show(args, grid)
    return 0


def layers_of(args: argparse.Namespace) -> list[int]:
    """Returns the layers of all parts, such as 0 and 10-12; none stand for all."""
    return [] if "all" in args.layers else [layer for part in args.layers for layer in part]


def show(args: argparse.Namespace, grid: PatchGrid) -> None:
    """Prints the largest effects and a heat map of each site, and draws the picture."""
    rows = [
        (
            cell.site,
            f"L{cell.layer}" if cell.head is None else f"L{cell.layer}H{cell.head}",
            grid.positions[cell.positions],
            f"{cell.metric:.4f}",
            f"{cell.effect:+.4f}",
            f"{cell.low:+.4f} to {cell.high:+.4f}",
        )
        for cell in grid.best(SHOWN)
    ]
    table(("site", "layer", "positions", "metric", "effect", "95 % interval"), rows)
    for site in grid.sites:
        print()
        print_lines(heat_map_lines(grid.effects(site), f"{site} at {', '.join(grid.positions)}", grid.layers))
    print(f"\nmetric {grid.source_metric:.4f} of the source, {grid.unpatched_metric:.4f} without a patch")
    for warning in grid.warnings:
        note(f"warning: {warning}")
    draw(args, grid)


def draw(args: argparse.Namespace, grid: PatchGrid) -> None:
    if args.picture is not None:
        write_picture(args, patching_figure(grid, f"{args.direction or 'restore'}: {len(args.pairs)} pair(s)"))
