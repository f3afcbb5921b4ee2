"""Heads in one argument: ``L18H6,L17H3``, or the id or tag of a head set."""

import argparse

from patchclamp.cli.parser import count
from patchclamp.heads import Head, HeadsLike
from patchclamp.places import listed_places


def heads(text: str) -> HeadsLike:
    """Returns the heads of what looks like a list of them, and takes all else for the id or tag of a head set."""
    if (named := listed_places(text, "H")) is not None:
        return [Head(*place) for place in named]
    if not text or "," in text:
        raise argparse.ArgumentTypeError(f"{text!r}: expected heads such as L18H6,L17H3, or a head set")
    return text


def add_heads_argument(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("heads", type=heads, metavar="HEADS|HEAD_SET", help="L18H6,L17H3, or the id or tag of a set")
    add_top_k_argument(parser)


def add_top_k_argument(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--top", type=count, default=0, metavar="K", help="of a head set, the K best (default: all above its threshold)"
    )
