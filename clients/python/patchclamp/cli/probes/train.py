"""patchclamp probes train"""

import argparse
import math
from collections.abc import Iterator, Sequence

from patchclamp import requests
from patchclamp.cli.detach import add_detach_argument, job_outcome
from patchclamp.cli.naming import add_naming_arguments, naming_options, note_stored
from patchclamp.cli.neurons.shown import add_picture_argument, write_picture
from patchclamp.cli.neurons.texts import add_text_arguments, texts_of
from patchclamp.cli.options import add_model_argument, connection_options, given
from patchclamp.cli.parser import seed
from patchclamp.cli.steering import layer_list
from patchclamp.cli.terminal import note, print_json, table
from patchclamp.client import Client
from patchclamp.names import POOLINGS, PROBE_METHODS, SITES
from patchclamp.pictures.probes import reliability_figure
from patchclamp.results import ProbeReport, ReliabilityBin

_WIDTH = 32


def add_parser(actions: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    parser = actions.add_parser(
        "train",
        parents=[connection_options(timeout=math.inf)],
        help="a probe of texts by label, with its report on texts that it has not seen",
    )
    parser.add_argument("name", help="tag to store it under")
    add_text_arguments(parser)
    parser.add_argument("--method", choices=PROBE_METHODS, default="logistic")
    parser.add_argument("--target", metavar="LABEL", help="whose probability is served (default: the first)")
    parser.add_argument("--site", choices=SITES, help="default: resid_post")
    parser.add_argument("--layers", type=layer_list, help="side by side, such as 8,12 (default: the best one)")
    parser.add_argument("--pooling", choices=POOLINGS, help="default: last_token")
    parser.add_argument("--penalty", type=float, help="default: chosen by cross-validation")
    parser.add_argument("--holdout-fraction", type=float, metavar="SHARE", help="default: 0.4")
    parser.add_argument("--seed", type=seed)
    add_picture_argument(parser, "the reliability of its probability as a picture")
    add_model_argument(parser)
    add_naming_arguments(parser)
    add_detach_argument(parser)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    options = given(args, "target", "site", "pooling", "penalty", "holdout_fraction", "seed", "model")
    options |= naming_options(args, args.name)
    if args.layers == "all":
        raise ValueError("--layers all: name those that stand side by side; without it the best one is taken")
    if args.layers is not None:
        options["layers"] = args.layers
    result = job_outcome(args, Client.train_probe, requests.train_probe, texts_of(args), args.method, **options)
    if result is None:
        return 0
    if args.picture is not None:
        write_picture(args, reliability_figure(result.report, args.name))
    if args.json:
        print_json(result)
        return 0
    if result.by_layer:
        table(("layer", "score"), [(each.layer, f"{each.score:.3f}") for each in result.by_layer])
    if target := result.artifact.provenance.get("target"):
        print(f"probability of {target} (labels: {', '.join(result.labels)})")
    table(("on texts it has not seen", "", "beside"), list(_figures(result.report)))
    for line in reliability_lines(result.report.reliability):
        print(line)
    for warning in result.warnings:
        note(f"warning: {warning}")
    note_stored(result.artifact, f"; layers {', '.join(map(str, result.layers))}")
    return 0


def _figures(report: ProbeReport) -> Iterator[tuple[str, str, str]]:
    """Yields rows of a table: what, how much, and what it stands beside."""
    yield "texts", str(report.texts), ""
    if report.accuracy or report.base_rate:
        yield "accuracy", f"{report.accuracy:.3f}", f"{report.base_rate:.3f} always the most frequent label"
        before = f"{report.brier_uncalibrated:.3f} uncalibrated"
        yield "Brier score", f"{report.brier:.3f}", f"{report.brier_base_rate:.3f} the base rate, {before}"
        yield "AUROC", f"{report.auroc:.3f}", "0.5"
        yield "code length ratio", f"{report.code_length_ratio:.3f}", "1 nothing learnt"
    else:
        yield "R²", f"{report.r_squared:.3f}", "0 the mean"
    yield "selectivity", f"{report.selectivity:.3f}", "0 as on labels dealt anew"
    yield "variance share", f"{report.variance_share:.4f}", "1 all that varies"


def reliability_lines(bins: Sequence[ReliabilityBin]) -> Iterator[str]:
    """Yields a line for each bin: a bar as long as the share of texts with the label, and | where it should end."""
    for each in bins:
        bar, due = (int(_WIDTH * share + 0.5) for share in (each.share, each.mean_probability))
        cells = ["█" if i < bar else " " for i in range(_WIDTH + 1)]
        cells[due] = "|"
        told = f"{each.share:.2f} of {each.texts} at {each.mean_probability:.2f}"
        yield f"p {each.low:.1f}-{each.high:.1f} {''.join(cells)} {told}"
