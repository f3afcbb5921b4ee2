"""patchclamp heads ablate"""

import argparse
import math

from patchclamp import requests
from patchclamp.cli.detach import add_detach_argument, job_outcome
from patchclamp.cli.files import text_file
from patchclamp.cli.heads.needles import add_needle_arguments, needle_test
from patchclamp.cli.heads.selection import add_heads_argument
from patchclamp.cli.options import add_model_argument, connection_options, given
from patchclamp.cli.parser import count
from patchclamp.cli.terminal import print_json, table
from patchclamp.client import Client
from patchclamp.names import HEAD_EDIT_MODES
from patchclamp.results import HeadEditEffect, HeadMetrics


def add_parser(actions: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    parser = actions.add_parser(
        "ablate",
        parents=[connection_options(timeout=math.inf)],
        help="what editing heads does to needles and perplexity",
    )
    add_heads_argument(parser)
    parser.add_argument("--mode", choices=HEAD_EDIT_MODES, default="zero", help="default: %(default)s")
    parser.add_argument("--scale", type=float, metavar="FACTOR", help="of the mode scale")
    parser.add_argument("--random-sets", type=count, default=0, metavar="N", help="of equal size (default: 10)")
    add_needle_arguments(parser)
    parser.add_argument(
        "--text", type=text_file, nargs="+", default=[], metavar="FILE", help="of perplexity (default: built in)"
    )
    add_model_argument(parser)
    add_detach_argument(parser)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    options = {
        **given(args, "scale"),
        "top_k": args.top,
        "random_sets": args.random_sets,
        "seed": args.seed,
        "test": needle_test(args),
        "texts": args.text,
        "model": args.model,
    }
    effect = job_outcome(args, Client.evaluate_head_edit, requests.evaluate_head_edit, args.heads, args.mode, **options)
    if effect is not None:
        show(args, effect)
    return 0


def show(args: argparse.Namespace, effect: HeadEditEffect) -> None:
    if args.json:
        print_json(effect)
    else:
        _show(effect, args.mode)


def _show(effect: HeadEditEffect, mode: str) -> None:
    edited = ",".join(map(str, effect.edited.heads))
    count = len(effect.random)
    rows = [
        ("unedited", *_cells(effect.unedited)),
        (f"{mode} {edited}", *_cells(effect.edited)),
        *((f"{mode} {','.join(map(str, each.heads))} (random)", *_cells(each)) for each in effect.random),
        (
            f"mean of {count} random sets",
            f"{effect.random_success_mean:.1f} ± {effect.random_success_deviation:.1f}",
            "",
            f"{effect.random_perplexity_mean:.3f} ± {effect.random_perplexity_deviation:.3f}",
        ),
    ]
    table(("heads", "needles found", "recall", "perplexity"), rows)


def _cells(metrics: HeadMetrics) -> tuple[str, ...]:
    return f"{metrics.successes}/{metrics.runs}", f"{metrics.mean_recall:.3f}", f"{metrics.perplexity:.3f}"
