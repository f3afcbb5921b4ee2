"""patchclamp watch stats"""

import argparse

from patchclamp.cli.options import connect, connection_options
from patchclamp.cli.terminal import note, print_json, table
from patchclamp.results import ItemStatistics, WatchStatistics


def add_parser(actions: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    parser = actions.add_parser("stats", parents=[connection_options()], help="what a running watch has seen")
    parser.add_argument("name")
    parser.add_argument("--item", action="append", default=[], metavar="NAME", help="only this one; repeatable")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    with connect(args) as client:
        statistics = client.watch_statistics(args.name, args.item)
    if args.json:
        print_json(statistics)
    else:
        _show(statistics)
    return 0


def _show(statistics: WatchStatistics) -> None:
    drifts = statistics.max_drift is not None
    probabilities = [f"q{each.probability:g}" for each in statistics.items[0].quantiles] if statistics.items else []
    header = ("item", "tokens", "fired", "mean", "deviation", "min", *probabilities, "max")
    rows = [
        (*_cells(item), *([f"{item.drift:.3f}" if item.drift is not None else ""] if drifts else []))
        for item in statistics.items
    ]
    table((*header, *(["drift"] if drifts else [])), rows)
    not_finite = sum(item.not_finite for item in statistics.items)
    if not_finite:
        note(f"{not_finite} values were not finite, and are in no other figure")
    if statistics.mean_drift is not None:
        note(f"drift: mean {statistics.mean_drift:.3f}, largest {statistics.max_drift:.3f}")


def _cells(item: ItemStatistics) -> tuple[object, ...]:
    quantiles = (f"{each.value:.4g}" for each in item.quantiles)
    fired = f"{item.fired / item.tokens:.1%}" if item.tokens else ""
    moments = (f"{value:.4g}" for value in (item.mean, item.standard_deviation, item.min))
    return item.name, item.tokens, fired, *moments, *quantiles, f"{item.max:.4g}"
