"""Neurons in one argument: ``L29N808,L3N5``, or the id or tag of a neuron set."""

import argparse

from patchclamp.cli.parser import count
from patchclamp.cli.steering import layer_list
from patchclamp.names import SITES
from patchclamp.neurons import Neuron, NeuronsLike
from patchclamp.places import listed_places


def neurons(text: str) -> NeuronsLike:
    """Returns the neurons of what looks like a list of them, and takes all else for the id or tag of a neuron set."""
    if (named := listed_places(text, "N")) is not None:
        return [Neuron(*place) for place in named]
    if not text or "," in text:
        raise argparse.ArgumentTypeError(f"{text!r}: expected neurons such as L29N808,L3N5, or a neuron set")
    return text


def add_neurons_argument(parser: argparse.ArgumentParser, *, optional: bool = False) -> None:
    parser.add_argument(
        "neurons",
        type=neurons,
        nargs="?" if optional else None,
        metavar="NEURONS|NEURON_SET",
        help=f"L29N808,L3N5, or the id or tag of a set{' (default: all of --layers)' if optional else ''}",
    )
    add_top_k_argument(parser)


def add_top_k_argument(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--top", type=count, default=0, metavar="K", help="of a neuron set with scores, the K best (default: all)"
    )


def add_layers_argument(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--layers", type=layer_list, default="all", help="such as 8-12 (default: %(default)s)")


def layers_of(args: argparse.Namespace) -> list[int]:
    """Returns the layers; none stand for all."""
    return [] if args.layers == "all" else args.layers


def add_site_argument(parser: argparse.ArgumentParser, default: str) -> None:
    parser.add_argument("--site", choices=SITES, help=f"where neurons are read (default: {default})")
