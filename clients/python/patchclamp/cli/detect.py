"""patchclamp vectors detect"""

import argparse
import math
from typing import Any

from patchclamp import requests
from patchclamp.cli.detach import add_detach_argument, job_outcome
from patchclamp.cli.neurons.shown import add_picture_argument, write_picture
from patchclamp.cli.neurons.texts import add_text_arguments, texts_of
from patchclamp.cli.options import add_model_argument, connection_options, given
from patchclamp.cli.parser import seed
from patchclamp.cli.steering import layer_list
from patchclamp.cli.terminal import note, print_json, table
from patchclamp.client import Client
from patchclamp.names import DETECTION_POOLINGS
from patchclamp.pictures.steering import detection_figure
from patchclamp.results import ConceptDetection, Interval


def add_parser(actions: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    parser = actions.add_parser(
        "detect",
        parents=[connection_options(timeout=math.inf)],
        help="how well vectors, probes and features tell the texts of a label from others, by layer and pooling",
    )
    parser.add_argument("detectors", nargs="*", metavar="detector", help="id or tag of a vector or probe")
    parser.add_argument(
        "--features",
        type=features,
        action="append",
        default=[],
        metavar="AUTOENCODER:N[,N...]",
        help="features of an autoencoder, such as gemma-sae:17,4242; repeatable",
    )
    parser.add_argument("--target", default="", metavar="LABEL", help="that is told from all others (default: none)")
    add_text_arguments(parser)
    parser.add_argument("--layers", type=layer_list, default="all", help="such as 8-12 (default: %(default)s)")
    parser.add_argument("--poolings", nargs="+", choices=DETECTION_POOLINGS, default=[], help="default: all three")
    parser.add_argument(
        "--calibration-fraction", type=float, metavar="SHARE", help="of the texts, for probabilities (default: 0.5)"
    )
    parser.add_argument("--seed", type=seed, default=0)
    add_model_argument(parser)
    add_picture_argument(parser, "picture of the AUROC by layer")
    add_detach_argument(parser)
    parser.set_defaults(run=run)


def features(text: str) -> tuple[str, list[int]]:
    """Reads AUTOENCODER:N,N; an id has a colon too."""
    autoencoder, colon, numbers = text.rpartition(":")
    listed = [seed(number) for number in numbers.split(",")] if colon and autoencoder else []
    if not listed:
        raise argparse.ArgumentTypeError(f"{text!r}: expected AUTOENCODER:N or AUTOENCODER:N,N")
    return autoencoder, listed


def run(args: argparse.Namespace) -> int:
    chosen: dict[str, list[int]] = {}
    for autoencoder, numbers in args.features:
        chosen.setdefault(autoencoder, []).extend(numbers)
    options: dict[str, Any] = {
        **given(args, "calibration_fraction"),
        "features": chosen,
        "layers": () if args.layers == "all" else args.layers,
        "poolings": args.poolings,
        "seed": args.seed,
        "model": args.model,
    }
    if args.picture is not None and not args.target:
        raise ValueError("--picture shows how well a label is detected: give --target LABEL")
    result = job_outcome(
        args, Client.detect_concept, requests.detect_concept, args.detectors, texts_of(args), args.target, **options
    )
    if result is None:
        return 0
    if args.json:
        print_json(result)
    else:
        _show(result)
    if args.picture is not None:
        write_picture(args, detection_figure(result, f"{args.target} by {', '.join([*args.detectors, *chosen])}"))
    return 0


def _show(result: ConceptDetection) -> None:
    rows = [
        (
            report.name,
            f"{report.layer}{' *' if i == result.best and report.auroc is not None else ''}",
            report.pooling.replace("_", " "),
            _shown(report.auroc),
            f"{report.random_auroc:.3f}",
            _shown(report.average_precision),
            f"{report.brier:.3f}",
            f"{report.brier_base_rate:.3f}",
        )
        for i, report in enumerate(result.detectors)
    ]
    measures = ("AUROC (95 %)", "random vectors", "average precision (95 %)", "Brier score", "of the base rate")
    table(("detector", "layer", "pooling", *measures), rows)
    for warning in result.warnings:
        note(f"warning: {warning}")
    note(f"{result.texts} texts")


def _shown(interval: Interval | None) -> str:
    return "" if interval is None else f"{interval.mean:.3f} ({interval.low:.3f} to {interval.high:.3f})"
