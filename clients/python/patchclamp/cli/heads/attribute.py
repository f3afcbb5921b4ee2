"""patchclamp heads attribute"""

import argparse
from collections.abc import Sequence
from typing import NamedTuple, cast

from patchclamp.cli.heads.scores import SHOWN, add_heat_map_argument, show_heat_map, write_heat_map
from patchclamp.cli.options import add_prompt_arguments, connect, connection_options, given, prompt_of
from patchclamp.cli.parser import count
from patchclamp.cli.terminal import print_json, quoted, table
from patchclamp.requests import AttributeOptions
from patchclamp.results import HeadScore, LogitAttribution, score_matrix

_SOURCES_SHOWN = 3


class Part(NamedTuple):
    """Is one row of the table."""

    name: str
    part: float
    sources: tuple[float, ...] = ()


def add_parser(actions: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    parser = actions.add_parser(
        "attribute", parents=[connection_options()], help="split a logit difference into parts by head and source token"
    )
    add_prompt_arguments(parser)
    parser.add_argument("--target", required=True, help="text whose first token is attributed")
    parser.add_argument("--contrast", default="", help="text whose first token it is compared with (default: none)")
    parser.add_argument(
        "--top-heads", type=count, metavar="K", help="heads that are split by source token (default: 10)"
    )
    add_heat_map_argument(parser)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    options = cast(AttributeOptions, given(args, "contrast", "model", "top_heads"))
    prompt = prompt_of(args)
    with connect(args) as client:
        result = client.attribute_logits(prompt, args.target, **options)
        pieces = () if args.json else client.tokenize(prompt, model=args.model).pieces
    matrix = score_matrix(HeadScore(each.head, each.part) for each in result.heads)
    if args.json:
        print_json(result)
    else:
        _show(result, pieces)
        show_heat_map(matrix)
    write_heat_map(args, matrix, "part of the logit difference")
    return 0


def _show(result: LogitAttribution, pieces: Sequence[str]) -> None:
    """Prints the largest parts, then the rest as one."""
    parts = [
        Part("embedding", result.embedding),
        Part("biases", result.biases),
        *(Part(f"MLP {layer}", part) for layer, part in enumerate(result.mlps)),
        *(Part(str(each.head), each.part, each.sources) for each in result.heads),
    ]
    parts.sort(key=lambda each: -abs(each.part))
    rest = parts[2 * SHOWN :]
    rows = [(each.name, f"{each.part:+.4f}", _sources(each.sources, pieces)) for each in parts[: 2 * SHOWN]]
    if rest:
        rows.append((f"{len(rest)} others", f"{sum(each.part for each in rest):+.4f}", ""))
    table(("part", "logits", "from"), rows)
    print(f"logit difference {result.logit_difference:.4f}, sum of all parts {result.parts_sum:.4f}")


def _sources(sources: Sequence[float], pieces: Sequence[str]) -> str:
    """Returns the source tokens with the largest parts, with their positions."""
    largest = sorted(range(len(sources)), key=lambda position: -abs(sources[position]))[:_SOURCES_SHOWN]
    shown = (f"{quoted(pieces[at])}@{at} {sources[at]:+.3f}" for at in largest)
    return "  ".join(shown)
