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
    header = ("item", "tokens", "left out", "threshold", "fired", "mean", "deviation", "min", *probabilities, "max")
    rows = [(*_cells(item), *(_drift(item) if drifts else ())) for item in statistics.items]
    table((*header, *(("drift", "by chance") if drifts else ())), rows)
    for kind in statistics.kinds:
        note(f"{kind.kind}: {kind.items} items, mean {kind.mean:.4g}, {kind.min:.4g} to {kind.max:.4g}")
    calibration = statistics.calibration
    if calibration is not None and calibration.tokens < calibration.total:
        first = f"{calibration.tokens} of {calibration.total}"
        note(f"thresholds, buckets and what is left out still follow from the first tokens: {first}")
    if statistics.sink_tokens:
        note(f"{statistics.sink_tokens} first tokens of sequences (attention sinks) are in no figure")
    if any(item.tokens_left_out for item in statistics.items):
        note("tokens left out (attention sinks: a norm above three times the median) are in no other figure")
    not_finite = sum(item.not_finite for item in statistics.items)
    if not_finite:
        note(f"{not_finite} values were not finite, and are in no other figure")
    if statistics.mean_drift_excess is not None:
        note(
            f"drift: mean {statistics.mean_drift:.3f}, of which {statistics.mean_drift_excess:.3f} beyond chance; "
            f"largest {statistics.max_drift:.3f}, of which {statistics.max_drift_excess:.3f} beyond chance"
        )


def _cells(item: ItemStatistics) -> tuple[object, ...]:
    quantiles = (f"{each.value:.4g}" for each in item.quantiles)
    fired = f"{item.fired / item.tokens:.1%}" if item.tokens else ""
    moments = (f"{value:.4g}" for value in (item.mean, item.standard_deviation, item.min))
    counts = (item.name, item.tokens, item.tokens_left_out)
    return *counts, f"{item.threshold:.4g}", fired, *moments, *quantiles, f"{item.max:.4g}"


def _drift(item: ItemStatistics) -> tuple[str, str]:
    if item.drift is None or item.drift_noise is None:
        return "", ""
    return f"{item.drift:.3f}", f"{item.drift_noise:.3f}"
