"""patchclamp watch start"""

import argparse
from typing import cast

from patchclamp.cli.options import connect, connection_options, given
from patchclamp.cli.parser import count
from patchclamp.cli.terminal import note, print_json
from patchclamp.names import PHASES
from patchclamp.requests import StartWatchOptions


def add_parser(actions: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    parser = actions.add_parser(
        "start",
        parents=[connection_options()],
        help="measure a stored watch from now on, on all servers of its store",
    )
    parser.add_argument("watch", help="id or tag of the watch")
    parser.add_argument("name", nargs="?", default="", help="label in Prometheus (default: the tag)")
    parser.add_argument("--sampling-rate", type=float, metavar="SHARE", help="of the tokens, at random (default: 1)")
    parser.add_argument("--phases", nargs="+", choices=PHASES, help="tokens that count (default: generated)")
    parser.add_argument("--window-tokens", type=count, metavar="N", help="that drift is measured over (default: 4096)")
    parser.add_argument("--buckets", type=float, nargs="+", metavar="BOUND", help="of the histograms in Prometheus")
    parser.add_argument("--reference", metavar="REF", help="watch_reference that drift is measured against")
    parser.add_argument(
        "--calibration-tokens",
        type=count,
        metavar="N",
        help="first tokens that thresholds and buckets follow from, without a reference (default: 1024)",
    )
    parser.add_argument("--export-items", action="store_true", help="series in Prometheus for each item too")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    options = given(args, "sampling_rate", "phases", "window_tokens", "buckets", "reference", "calibration_tokens")
    options["export_items"] = args.export_items
    with connect(args) as client:
        watch = client.start_watch(args.watch, args.name, **cast(StartWatchOptions, options))
    if args.json:
        print_json(watch)
    else:
        note(f"{watch.name}: {len(watch.items)} items of {watch.watch}")
    return 0
