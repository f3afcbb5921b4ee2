"""patchclamp vectors extract"""

import argparse
import math
from typing import cast

from patchclamp import requests
from patchclamp.cli.detach import add_detach_argument, job_outcome
from patchclamp.cli.files import json_lines, json_texts
from patchclamp.cli.naming import add_naming_arguments, naming_options, note_stored
from patchclamp.cli.neurons.texts import add_text_sources, add_window_arguments, texts_of
from patchclamp.cli.options import connection_options, given
from patchclamp.cli.parser import count, seed
from patchclamp.cli.steering import layer_list
from patchclamp.cli.terminal import note, print_json, table
from patchclamp.client import Client
from patchclamp.names import METHODS, POOLINGS, SITES
from patchclamp.programs import Scope, everything, last, role
from patchclamp.requests import Messages, PromptLike
from patchclamp.results import ExtractionResult, TokenProjections


def add_parser(actions: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    parser = actions.add_parser(
        "extract", parents=[connection_options(timeout=math.inf)], help="find a vector from examples"
    )
    parser.add_argument("name", help="tag to store it under")
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument(
        "--pairs",
        type=pairs_file,
        metavar="FILE",
        help='lines of {"positive": ..., "negative": ...}, each a text or a list of chat messages',
    )
    add_text_sources(source)
    source.add_argument(
        "--demonstrations",
        type=demonstrations_file,
        metavar="FILE",
        help='instead: lines of {"input": ..., "output": ...}, of task_vector and definition',
    )
    source.add_argument(
        "--word-pairs",
        type=words_file,
        metavar="FILE",
        help='instead: lines of {"positive": ..., "negative": ...}, words of causal_inner_product',
    )
    add_window_arguments(parser)
    parser.add_argument("--target", metavar="LABEL", help="of the texts: the positive ones, needed with them")
    parser.add_argument("--contrast", metavar="LABEL", help="of the texts: the negative ones (default: all others)")
    parser.add_argument(
        "--definition", metavar="TEXT", help="of the concept, worded as the inputs of --demonstrations are"
    )
    parser.add_argument("--method", choices=METHODS, default="difference_of_means", help="default: %(default)s")
    parser.add_argument("--site", choices=SITES, help="of the residual stream (default: resid_post)")
    parser.add_argument("--layers", type=layer_list, default="all", help="such as 8-12 (default: %(default)s)")
    parser.add_argument("--pooling", choices=POOLINGS, help="default: last_token")
    parser.add_argument("--last", type=count, metavar="K", help="pool the last K tokens alone")
    parser.add_argument("--role", help="pool tokens of chat turns of this role alone")
    parser.add_argument("--holdout-fraction", type=float, metavar="SHARE", help="default: 0.25")
    parser.add_argument("--max-steps", type=count, help="of reft_r1, as are the next three (default: 500)")
    parser.add_argument("--learning-rate", type=float, help="(default: 0.005)")
    parser.add_argument("--batch-size", type=count, help="(default: 16)")
    parser.add_argument("--patience", type=count, help="evaluations without a lower held-out loss (default: 5)")
    parser.add_argument("--seed", type=seed)
    add_naming_arguments(parser)
    add_detach_argument(parser)
    parser.set_defaults(run=run)


def pairs_file(path: str) -> list[tuple[PromptLike, PromptLike]]:
    """Returns (positive, negative) of every line that is not blank."""
    expected = '{"positive": ..., "negative": ...}, each a text or a list of {"role", "content"}'
    return json_lines(path, lambda pair: (prompt_of(pair["positive"]), prompt_of(pair["negative"])), expected)


def demonstrations_file(path: str) -> list[tuple[str, str]]:
    return json_texts(path, _both, "input", "output")


def words_file(path: str) -> list[tuple[str, str]]:
    return json_texts(path, _both, "positive", "negative")


def run(args: argparse.Namespace) -> int:
    inputs = given(args, "target", "contrast", "demonstrations", "definition", "word_pairs")
    own = "site", "pooling", "holdout_fraction", "max_steps", "learning_rate", "batch_size", "patience", "seed"
    options = {**given(args, *own), **naming_options(args, args.name)}
    if any(source is not None for source in (args.texts, args.corpus, args.data)):
        inputs["texts"] = texts_of(args)
    if args.layers != "all":
        options["layers"] = args.layers
    if args.last is not None or args.role is not None:
        options["scope"] = _scope(args)
    pairs = args.pairs or ()
    result = job_outcome(
        args, Client.extract_vectors, requests.extract_vectors, pairs, args.method, **inputs, **options
    )
    if result is not None:
        show(args, result)
    return 0


def show(args: argparse.Namespace, result: ExtractionResult) -> None:
    if args.json:
        print_json(result)
        return
    _show(result)
    for warning in result.warnings:
        note(f"warning: {warning}")
    note_stored(result.artifact, f"; best layer {result.best_layer}")


def _show(result: ExtractionResult) -> None:
    shown = _columns(result)
    table(tuple(shown), list(zip(*shown.values(), strict=True)))
    _show_training(result)
    if result.baselines:
        baselines = "; ".join(
            f"{name.replace('_', ' ')} {value:.3f}" for name, value in sorted(result.baselines.items())
        )
        print(f"held-out accuracy otherwise: {baselines}")
    note(f"held-out accuracy: {result.measure}")


def _columns(result: ExtractionResult) -> dict[str, list[str]]:
    """Returns the cells of each column by its head, without columns that the method does not measure."""
    layers = result.layers
    columns = {
        "layer": [f"{each.layer}{' *' if each.layer == result.best_layer else ''}" for each in layers],
        "held-out accuracy": [f"{each.heldout_accuracy:.3f}" for each in layers],
        "control" if result.baselines else "random direction": [f"{each.random_accuracy:.3f}" for each in layers],
        "norm": [f"{each.norm:.3f}" for each in layers],
    }
    if any(each.activation_norm for each in layers):
        columns["activation norm"] = [f"{each.activation_norm:.3f}" for each in layers]
    if any(each.explained_variance for each in layers):
        columns["explained variance"] = [f"{each.explained_variance:.3f}" for each in layers]
    if any(each.midpoint for each in layers):
        columns["midpoint"] = [f"{each.midpoint:.3f}" for each in layers]
    if any(each.margin for each in layers):
        columns["margin"] = [f"{each.margin:.2f}" for each in layers]
    if any(each.positive_tokens or each.negative_tokens for each in layers):
        columns["tokens of positives"] = [_middle(each.positive_tokens) for each in layers]
        columns["tokens of negatives"] = [_middle(each.negative_tokens) for each in layers]
    if any(each.participation_ratio for each in layers):
        columns["participation ratio"] = [f"{each.participation_ratio:.1f}" for each in layers]
    if any(each.pooled_tokens or each.tokens_left_out for each in layers):
        left_out = [(each.tokens_left_out, each.pooled_tokens + each.tokens_left_out) for each in layers]
        columns["tokens left out"] = [f"{left} of {tokens}" for left, tokens in left_out]
    return columns


def _show_training(result: ExtractionResult) -> None:
    trained = [(str(layer.layer), layer.training) for layer in result.layers if layer.training is not None]
    if not trained:
        return
    heads = (
        "AUROC",
        "random",
        "difference of means",
        "loss unedited",
        "with the vector",
        "random",
        "difference of means",
    )
    table(
        ("layer", "steps", *heads),
        [
            (
                layer,
                str(t.steps),
                *(f"{area:.3f}" for area in (t.auroc, t.random_auroc, t.difference_auroc)),
                *(f"{loss:.3f}" for loss in (t.unedited_loss, t.loss, t.random_loss, t.difference_loss)),
            )
            for layer, t in trained
        ],
    )


def _scope(args: argparse.Namespace) -> Scope:
    scope = everything() if args.last is None else last(args.last)
    return scope if args.role is None else scope & role(args.role)


def _both(first: str, second: str) -> tuple[str, str]:
    return first, second


def _middle(tokens: TokenProjections | None) -> str:
    """Returns between what the projections of nine tokens in ten lie."""
    return "" if tokens is None else f"{tokens.p05:.2f} to {tokens.p95:.2f}"


def prompt_of(value: object) -> PromptLike:
    """Returns a prompt of a line of JSON. Raises ValueError for what is neither a text nor a list of chat messages."""
    if isinstance(value, str):
        return value
    if isinstance(value, list) and value and all(map(_is_turn, value)):
        return cast(Messages, value)
    raise ValueError(value)


def _is_turn(turn: dict[str, object]) -> bool:
    return set(turn) == {"role", "content"} and all(isinstance(text, str) for text in turn.values())
