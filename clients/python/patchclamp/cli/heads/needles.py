"""Arguments of a needle test."""

import argparse
from collections.abc import Callable
from typing import TypeVar

from patchclamp.cli.files import json_texts, text_file
from patchclamp.cli.parser import count, seed
from patchclamp.heads import Needle, NeedleTest

NumberT = TypeVar("NumberT", int, float)


def add_needle_arguments(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("needle test (default: built into the server)")
    group.add_argument(
        "--haystack", type=text_file, nargs="+", default=[], metavar="FILE", help="plain text that hides the needles"
    )
    group.add_argument(
        "--needles",
        type=needles_file,
        default=[],
        metavar="FILE",
        help='lines of {"question": ..., "needle": ..., "answer": ...}',
    )
    group.add_argument("--lengths", type=_numbers(int), default=[], metavar="N,...", help="tokens of the prompts")
    group.add_argument("--depths", type=_numbers(float), default=[], metavar="X,...", help="0 (start) to 1 (end)")
    group.add_argument("--seed", type=seed, default=0)
    group.add_argument("--max-runs", type=count, default=0, metavar="N", help="default: every needle, length and depth")


def needle_test(args: argparse.Namespace) -> NeedleTest:
    return NeedleTest(args.haystack, args.needles, args.lengths, args.depths, args.seed, args.max_runs)


def needles_file(path: str) -> list[Needle]:
    return json_texts(path, Needle, "question", "needle", "answer")


def _numbers(kind: Callable[[str], NumberT]) -> Callable[[str], list[NumberT]]:
    def parse(text: str) -> list[NumberT]:
        try:
            return [kind(part) for part in text.split(",")]
        except ValueError:
            raise argparse.ArgumentTypeError(f"{text!r} is not a list of numbers such as 256,512 or .1,.5") from None

    return parse
