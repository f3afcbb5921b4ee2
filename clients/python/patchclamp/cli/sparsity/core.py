"""patchclamp sparsity core"""

import argparse
from collections.abc import Sequence

from patchclamp.cli.options import add_model_argument, connect, connection_options
from patchclamp.cli.sparse_spec import spec
from patchclamp.cli.steering import layer_list
from patchclamp.cli.terminal import print_json, table
from patchclamp.results import CoreNeurons


def add_parser(actions: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    parser = actions.add_parser(
        "core", parents=[connection_options()], help="the neurons a policy fixes for prompts, and how much they overlap"
    )
    parser.add_argument("prompts", nargs="+", metavar="PROMPT")
    parser.add_argument(
        "--sparsity",
        type=spec,
        required=True,
        metavar="PROFILE|POLICY[:SETTING,...]",
        help="one whose set is fixed by the prompt, such as coreinfer_stability:keep_ratio=.4 or griffin",
    )
    parser.add_argument("--layers", type=layer_list, default="all", help="such as 8-12 (default: %(default)s)")
    add_model_argument(parser)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    layers = () if args.layers == "all" else args.layers
    with connect(args) as client:
        result = client.predict_core_neurons(args.prompts, args.sparsity.sparsity, layers=layers, model=args.model)
    if args.json:
        print_json(result)
        return 0
    _print_sets(args.prompts, result)
    return 0


def _print_sets(prompts: Sequence[str], result: CoreNeurons) -> None:
    """Prints the sizes by layer of each prompt; --json has the neurons themselves."""
    rows = [
        (i, layer, len(neurons), " ".join(map(str, neurons[:8])) + (" ..." if len(neurons) > 8 else ""))
        for i, layers in enumerate(result.prompts)
        for layer, neurons in layers.items()
    ]
    for i, prompt in enumerate(prompts):
        print(f"prompt {i}: {prompt}")
    table(("prompt", "layer", "neurons", "first of them"), rows)
    if result.overlaps:
        print()
        table(
            ("prompts", "mean overlap", "least", "most"),
            [
                (f"{o.first}, {o.second}", f"{o.mean_jaccard:.3f}", f"{min(o.jaccard):.3f}", f"{max(o.jaccard):.3f}")
                for o in result.overlaps
            ],
        )
