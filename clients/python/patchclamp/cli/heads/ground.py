"""patchclamp heads ground"""

import argparse
import math
from collections import Counter
from collections.abc import Sequence

from patchclamp.cli.generate import print_ending
from patchclamp.cli.heads.selection import add_top_k_argument
from patchclamp.cli.options import (
    add_generation_arguments,
    connect,
    connection_options,
    generate_options,
    prompt_of,
)
from patchclamp.cli.terminal import heading, note, print_json, quoted, table
from patchclamp.heads import Grounding, Head
from patchclamp.requests import GenerateOptions
from patchclamp.results import GroundedRange, GroundingReport, Token

_HEADS_SHOWN = 3


def add_parser(actions: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    parser = actions.add_parser(
        "ground",
        parents=[connection_options(timeout=math.inf)],
        help="an answer, and the parts of the prompt it was copied from",
    )
    parser.add_argument("head_set", metavar="HEAD_SET", help="id or tag, for example of `heads detect`")
    add_generation_arguments(parser)
    add_top_k_argument(parser)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    options: GenerateOptions = {**generate_options(args), "grounding": Grounding(args.head_set, args.top)}
    with connect(args) as client, client.generate(prompt_of(args), **options) as stream:
        if args.json:
            print_json(stream.result())
            return 0
        for piece in stream.text:
            print(piece, end="", flush=True)
        print()
        result = stream.result()
    if result.grounding is not None:
        _show(result.grounding, result.tokens)
    print_ending(result)
    return 0


def _show(report: GroundingReport, tokens: Sequence[Token]) -> None:
    if report.ranges:
        print()
        heading("copied from the prompt")
        rows = [
            (
                f"{each.start}-{each.end - 1}",
                each.tokens,
                _heads(each, tokens),
                quoted(each.text),
            )
            for each in report.ranges
        ]
        table(("positions", "tokens", "most by", "text"), rows)
    note(report)


def _heads(place: GroundedRange, tokens: Sequence[Token]) -> str:
    """Returns the heads that copied most of the tokens of a range."""
    counts = Counter(
        Head(source.layer, source.head)
        for token in tokens
        for source in token.sources
        if place.start <= source.position < place.end
    )
    return " ".join(str(head) for head, _ in counts.most_common(_HEADS_SHOWN))
