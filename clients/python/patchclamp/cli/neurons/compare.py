"""patchclamp neurons compare"""

import argparse

from patchclamp.cli.neurons.selection import add_top_k_argument
from patchclamp.cli.options import connect, connection_options
from patchclamp.cli.terminal import print_json, table


def add_parser(actions: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    parser = actions.add_parser("compare", parents=[connection_options()], help="overlap of neuron sets")
    parser.add_argument("neuron_sets", nargs="+", metavar="NEURON_SET", help="ids or tags, 2 to 64")
    add_top_k_argument(parser)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    with connect(args) as client:
        comparisons = client.compare_neuron_sets(args.neuron_sets, top_k=args.top)
    if args.json:
        print_json(comparisons)
        return 0
    table(
        ("neuron sets", "common", "expected", "p", "jaccard", "overlap", "by layer"),
        [
            (
                f"{args.neuron_sets[each.first]}, {args.neuron_sets[each.second]}",
                each.common,
                f"{each.expected_common:.2f}",
                f"{each.p_value:.3g}",
                f"{each.jaccard:.3f}",
                f"{each.overlap_coefficient:.3f}",
                " ".join(f"L{layer.layer}:{layer.neurons}" for layer in each.common_by_layer),
            )
            for each in comparisons
        ],
    )
    return 0
