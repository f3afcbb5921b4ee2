"""patchclamp heads compare"""

import argparse

from patchclamp.cli.heads.selection import add_top_k_argument
from patchclamp.cli.options import connect, connection_options
from patchclamp.cli.terminal import print_json, table


def add_parser(actions: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    parser = actions.add_parser("compare", parents=[connection_options()], help="overlap of head sets")
    parser.add_argument("head_sets", nargs="+", metavar="HEAD_SET", help="ids or tags, 2 to 64")
    add_top_k_argument(parser)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    with connect(args) as client:
        comparisons = client.compare_head_sets(args.head_sets, top_k=args.top)
    if args.json:
        print_json(comparisons)
        return 0
    table(
        ("head sets", "common", "expected", "jaccard", "overlap", "rank correlation"),
        [
            (
                f"{args.head_sets[each.first]}, {args.head_sets[each.second]}",
                each.common,
                f"{each.expected_common:.2f}",
                f"{each.jaccard:.3f}",
                f"{each.overlap_coefficient:.3f}",
                f"{each.rank_correlation:.3f}",
            )
            for each in comparisons
        ],
    )
    return 0
