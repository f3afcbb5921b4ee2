"""patchclamp neurons census"""

import argparse
import math

from patchclamp import requests
from patchclamp.cli.detach import add_detach_argument, job_outcome
from patchclamp.cli.naming import add_naming_arguments, naming_options
from patchclamp.cli.neurons.selection import add_layers_argument, add_site_argument, layers_of
from patchclamp.cli.neurons.shown import SHOWN, add_picture_argument, note_stored_set, write_picture
from patchclamp.cli.neurons.texts import add_text_arguments, texts_of
from patchclamp.cli.options import add_model_argument, connection_options, given
from patchclamp.cli.parser import count, seed
from patchclamp.cli.terminal import note, print_json, quoted, table
from patchclamp.client import Client
from patchclamp.pictures.neurons import census_figure
from patchclamp.results import NeuronCensus

_SHARES = (
    ("--threshold", "fires above it (default: 0)"),
    ("--rare-below", "a rare neuron: share of tokens (default: 0.0001)"),
    ("--always-from", "an always-on neuron: share of tokens (default: 0.99)"),
    ("--detector-recall", "a detector: share of the occurrences (default: 0.95)"),
    ("--detector-elsewhere", "a detector: share of its firings elsewhere (default: 0.05)"),
    ("--positional-from", "a positional neuron: bits (default: 0.05)"),
)
_COUNTS = (
    ("--ngram", count, "longest n-grams (default: 2)"),
    ("--min-occurrences", count, "below which a token shows nothing (default: 10)"),
    ("--position-bins", count, "bins of the positions (default: 32)"),
    ("--checkpoint-tokens", seed, "tokens between checkpoints (default: 50,000)"),
)
_OPTIONS = tuple(each[0][2:].replace("-", "_") for each in (*_SHARES, *_COUNTS))


def add_parser(actions: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    parser = actions.add_parser(
        "census",
        parents=[connection_options(timeout=math.inf)],
        help="dead, rare and always-on neurons, detectors of tokens, positional ones",
    )
    parser.add_argument("name", help="tag: the classes are stored as NAME-dead, NAME-token and so on")
    add_text_arguments(parser)
    add_layers_argument(parser)
    add_site_argument(parser, "mlp_gate, else mlp_post")
    for option, text in _SHARES:
        parser.add_argument(option, type=float, metavar="X", help=text)
    for option, kind, text in _COUNTS:
        parser.add_argument(option, type=kind, metavar="N", help=text)
    parser.add_argument("--magnitude", action="store_true", help="it fires where its absolute value is above it")
    parser.add_argument("--restart", action="store_true", help="begin anew where a checkpoint is kept")
    add_naming_arguments(parser)
    add_detach_argument(parser)
    add_model_argument(parser)
    add_picture_argument(parser, "picture of the classes by layer")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    options = {
        **given(args, *_OPTIONS, "site", "magnitude", "restart", "model"),
        "layers": layers_of(args),
        **naming_options(args, args.name),
    }
    census = job_outcome(args, Client.census_neurons, requests.census_neurons, texts_of(args), **options)
    if census is not None:
        show(args, census)
    return 0


def show(args: argparse.Namespace, census: NeuronCensus) -> None:
    if args.json:
        print_json(census)
    else:
        _show(census)
    if args.picture is not None:
        write_picture(args, census_figure(census.layers, f"{census.tokens:,} tokens"))


def _show(census: NeuronCensus) -> None:
    table(
        ("layer", "neurons", "dead", "rare", "always on", "token", "n-gram", "positional", "mean rate"),
        [
            (
                each.layer,
                each.neurons,
                each.dead,
                each.rare,
                each.always,
                each.token_detectors,
                each.ngram_detectors,
                each.positional,
                f"{each.mean_rate:.4f}",
            )
            for each in census.layers
        ],
    )
    if census.detectors:
        print()
        table(
            ("detector", "of", "occurrences", "recall", "elsewhere"),
            [
                (each.neuron, quoted(each.text), each.occurrences, f"{each.recall:.3f}", f"{each.elsewhere:.3f}")
                for each in census.detectors[:SHOWN]
            ],
        )
    if census.positional:
        print()
        rows = [(each.neuron, f"{each.bits:.3f}") for each in census.positional[:SHOWN]]
        table(("positional", "bits"), rows)
    resumed = f", {census.resumed_tokens:,} of them from the checkpoint" if census.resumed_tokens else ""
    note(f"{census.texts:,} texts, {census.tokens:,} tokens{resumed}; {census.tokens_per_second:,.0f} tokens/s")
    for each in census.classes:
        note_stored_set(each.stored)
