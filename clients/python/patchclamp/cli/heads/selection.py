"""Heads in one argument: ``L18H6,L17H3``, or the id or tag of a head set."""

import argparse
import re

from patchclamp.cli.parser import count
from patchclamp.heads import Head, HeadsLike

_LISTED = re.compile(r"L\d+H\d+(,L\d+H\d+)*")
_HEAD = re.compile(r"L(\d+)H(\d+)")


def heads(text: str) -> HeadsLike:
    """Returns the heads of what looks like a list of them, and takes all else for the id or tag of a head set."""
    if _LISTED.fullmatch(text):
        return [Head(int(layer), int(head)) for layer, head in _HEAD.findall(text)]
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
