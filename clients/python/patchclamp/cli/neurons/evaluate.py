"""patchclamp neurons evaluate"""

import argparse
import math
from pathlib import Path
from typing import Any

from patchclamp import requests
from patchclamp.cli.detach import add_detach_argument, job_outcome
from patchclamp.cli.neurons.selection import add_neurons_argument
from patchclamp.cli.neurons.shown import add_picture_argument, write_picture
from patchclamp.cli.neurons.texts import facts_file, line_file, named_file
from patchclamp.cli.options import add_model_argument, connection_options, given
from patchclamp.cli.parser import count, seed
from patchclamp.cli.terminal import print_json, table
from patchclamp.client import Client
from patchclamp.names import NEURON_EDIT_MODES
from patchclamp.neurons import FactsTest, GenerationTest, NeuronTestLike, TextsTest
from patchclamp.pictures.neurons import dose_response_figure
from patchclamp.results import NeuronEditEffect

_FACTS = (".jsonl", ".tsv")


def add_parser(actions: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    parser = actions.add_parser(
        "evaluate",
        parents=[connection_options(timeout=math.inf)],
        help="what editing growing parts of a set changes, beside random sets",
    )
    add_neurons_argument(parser)
    parser.add_argument("--mode", choices=NEURON_EDIT_MODES, default="zero", help="default: %(default)s")
    parser.add_argument("--value", type=float, help="of clamp (default: the set's own values) and scale")
    tests = parser.add_argument_group("tests", "facts in .jsonl or .tsv: accuracy; else a text a line: perplexity")
    what: dict[str, Any] = {"type": check_file, "action": "append", "default": [], "metavar": "[NAME=]FILE"}
    tests.add_argument("--target", **what, help="what should change; repeatable")
    tests.add_argument("--side", **what, help="what should not; repeatable")
    tests.add_argument("--prompts", type=line_file, metavar="FILE", help="a target too: text generated after each line")
    tests.add_argument("--words", nargs="+", default=[], metavar="WORD", help="counted in that text")
    tests.add_argument("--probe", type=probe, metavar="VECTOR@LAYER", help="whose midpoint that text lies above")
    tests.add_argument("--max-tokens", type=count, default=0, metavar="N", help="of that text (default: 32)")
    parser.add_argument("--fractions", type=float, nargs="+", default=[], metavar="X", help="default: .1 .25 .5 1")
    parser.add_argument("--random-sets", type=count, default=0, metavar="N", help="of equal size (default: 10)")
    parser.add_argument("--seed", type=seed, default=0)
    parser.add_argument("--scope", choices=("all", "prompt", "generated"), help="tokens that are edited (default: all)")
    parser.add_argument(
        "--mean-texts",
        type=line_file,
        default=[],
        metavar="FILE",
        help="of the mode mean, one a line (default: built-in text)",
    )
    add_detach_argument(parser)
    add_model_argument(parser)
    add_picture_argument(parser, "picture of the changes by fraction")
    parser.set_defaults(run=run)


def check_file(text: str) -> NeuronTestLike:
    """Reads a test from [NAME=]FILE: of facts, or of texts."""
    name, path = named_file(text)
    return FactsTest(name, facts_file(path)) if Path(path).suffix in _FACTS else TextsTest(name, line_file(path))


def probe(text: str) -> tuple[str, int]:
    """Reads VECTOR@LAYER."""
    vector, at, layer = text.rpartition("@")
    if not at or not vector or not layer.isdecimal():
        raise argparse.ArgumentTypeError(f"{text!r}: expected VECTOR@LAYER, such as joyful_sad@16")
    return vector, int(layer)


def targets_of(args: argparse.Namespace) -> list[NeuronTestLike]:
    """Returns the targets. ValueError for what is counted in generated text where none is generated."""
    if args.prompts is None:
        if args.words or args.probe is not None or args.max_tokens:
            raise ValueError("--words, --probe and --max-tokens are of text generated after --prompts FILE")
        return list(args.target)
    vector, layer = args.probe or ("", None)
    generated = GenerationTest("generation", args.prompts, args.max_tokens, args.words, vector, layer)
    return [*args.target, generated]


def run(args: argparse.Namespace) -> int:
    options: dict[str, Any] = {
        **given(args, "value", "scope", "model"),
        "sides": args.side,
        "top_k": args.top,
        "fractions": args.fractions,
        "random_sets": args.random_sets,
        "seed": args.seed,
        "mean_texts": args.mean_texts,
    }
    arguments = (args.neurons, args.mode, targets_of(args))
    effect = job_outcome(args, Client.evaluate_neuron_edit, requests.evaluate_neuron_edit, *arguments, **options)
    if effect is not None:
        show(args, effect)
    return 0


def show(args: argparse.Namespace, effect: NeuronEditEffect) -> None:
    if args.json:
        print_json(effect)
    else:
        _show(effect)
    if args.picture is not None:
        named = args.neurons if isinstance(args.neurons, str) else ",".join(map(str, args.neurons))
        write_picture(args, dose_response_figure(effect, f"{args.mode} {named}"))


def _show(effect: NeuronEditEffect) -> None:
    rows = [
        (
            f"{point.fraction:g}",
            point.neurons,
            f"{each.test}{' (side)' if each.side else ''}",
            each.metric,
            f"{each.unedited:.4g}",
            f"{each.edited:.4g}",
            f"{each.change:+.3g} ({each.low:+.3g} to {each.high:+.3g})",
            f"{each.random_mean:+.3g} ± {each.random_deviation:.2g}",
            f"{each.beyond_random:+.3g} ({each.beyond_random_low:+.3g} to {each.beyond_random_high:+.3g})",
        )
        for point in effect.points
        for each in point.measurements
    ]
    changes = ("unedited", "edited", "change (95 %)", "random sets", "beyond them")
    table(("fraction", "neurons", "test", "metric", *changes), rows)
