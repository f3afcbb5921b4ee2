"""patchclamp vectors subspace"""

import argparse
import math
from typing import Any

from patchclamp import requests
from patchclamp.cli.detach import add_detach_argument, job_outcome
from patchclamp.cli.extract import prompt_of
from patchclamp.cli.files import json_lines, text_of
from patchclamp.cli.naming import add_naming_arguments, naming_options, note_stored
from patchclamp.cli.options import connection_options, given
from patchclamp.cli.parser import count, seed
from patchclamp.cli.steering import layer_list
from patchclamp.cli.terminal import note, print_json, table
from patchclamp.client import Client
from patchclamp.names import SITES
from patchclamp.requests import PromptLike
from patchclamp.results import FoundSubspace
from patchclamp.subspaces import Interchange, SubspaceMethod, circular_plane, interchange

_TRAINING = ("rank", "holdout_fraction", "max_steps", "learning_rate", "batch_size", "patience")


def add_parser(actions: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    parser = actions.add_parser(
        "subspace",
        parents=[connection_options(timeout=math.inf)],
        help="find the plane of a cycle, or train a subspace that carries one variable",
    )
    parser.add_argument("name", help="tag to store it under")
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument(
        "--cycle",
        type=cycle_file,
        metavar="FILE",
        help='lines of {"value": "Monday", "prompts": [...]} in the order of the cycle',
    )
    what.add_argument(
        "--pairs", type=pairs_file, metavar="FILE", help='lines of {"base": ..., "source": ..., "answer": ...}'
    )
    parser.add_argument("--components", type=count, help="with --cycle: principal components that planes are made of")
    parser.add_argument(
        "--kept", type=pairs_file, default=[], metavar="FILE", help="with --pairs: such that keep their answers"
    )
    parser.add_argument("--rank", type=count, help="with --pairs: dimensions of the subspace (default: 1)")
    parser.add_argument("--holdout-fraction", type=float, metavar="SHARE")
    parser.add_argument("--max-steps", type=count)
    parser.add_argument("--learning-rate", type=float)
    parser.add_argument("--batch-size", type=count)
    parser.add_argument("--patience", type=count, help="evaluations without a lower held-out loss (default: 5)")
    parser.add_argument("--site", choices=SITES)
    parser.add_argument("--layers", type=layer_list, default="all", help="such as 8-12 (default: %(default)s)")
    parser.add_argument("--seed", type=seed)
    add_naming_arguments(parser)
    add_detach_argument(parser)
    parser.set_defaults(run=run)


def cycle_file(path: str) -> list[tuple[str, list[PromptLike]]]:
    """Returns the value and the prompts of every line that is not blank."""

    def value(line: dict[str, object]) -> tuple[str, list[PromptLike]]:
        prompts = line["prompts"]
        if not isinstance(prompts, list) or not prompts:
            raise ValueError(prompts)
        return text_of(line, "value"), [prompt_of(each) for each in prompts]

    return json_lines(path, value, '{"value": ..., "prompts": [...]}, each prompt a text or a list of chat messages')


def pairs_file(path: str) -> list[Interchange]:
    expected = '{"base": ..., "source": ..., "answer": ...}, the answer a text'
    return json_lines(
        path, lambda line: (prompt_of(line["base"]), prompt_of(line["source"]), text_of(line, "answer")), expected
    )


def run(args: argparse.Namespace) -> int:
    options: dict[str, Any] = {**given(args, "site", "seed"), **naming_options(args, args.name)}
    if args.layers != "all":
        options["layers"] = args.layers
    method = _method(args)
    result = job_outcome(args, Client.find_subspace, requests.find_subspace, method, **options)
    if result is None:
        return 0
    if args.json:
        print_json(result)
    else:
        show(args, result)
    return 0


def _method(args: argparse.Namespace) -> SubspaceMethod:
    training = given(args, *_TRAINING)
    if args.cycle is None:
        if args.components is not None:
            raise ValueError("--components is for --cycle")
        return interchange(args.pairs, args.kept, **training)
    if args.kept or training:
        raise ValueError(f"--kept and {', '.join('--' + name.replace('_', '-') for name in _TRAINING)} are for --pairs")
    values = dict(args.cycle)
    if len(values) != len(args.cycle):
        raise ValueError("--cycle names a value twice")
    return circular_plane(values, **given(args, "components"))


def show(args: argparse.Namespace, result: FoundSubspace) -> None:
    """Prints the evidence of each layer, of a plane its angles, and what the subspace is stored as."""

    def layer(number: int) -> str:
        return f"{number}{' *' if number == result.best_layer else ''}"

    heads: tuple[str, ...]
    rows: list[tuple[str, ...]]
    if any(each.angles for each in result.layers):
        heads = ("layer", "circularity", "shuffled", "explained variance", "angles in degrees")
        rows = [
            (
                layer(each.layer),
                f"{each.circularity:.3f}",
                f"{each.shuffled_circularity:.3f}",
                f"{each.explained_variance:.3f}",
                " ".join(f"{math.degrees(angle):.0f}" for angle in each.angles),
            )
            for each in result.layers
        ]
    else:
        heads = ("layer", "accuracy", "random subspace", "whole state", "kept", "loss", "steps")
        rows = [
            (
                layer(each.layer),
                f"{each.accuracy:.3f}",
                f"{each.random_accuracy:.3f}",
                f"{each.full_accuracy:.3f}",
                f"{each.kept_accuracy:.3f}",
                f"{each.loss:.3f}",
                str(each.steps),
            )
            for each in result.layers
        ]
    table(heads, rows)
    for warning in result.warnings:
        note(f"warning: {warning}")
    note_stored(result.artifact, f"; best layer {result.best_layer}")
