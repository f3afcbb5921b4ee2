"""patchclamp neurons localize"""

import argparse
import inspect
import math
from collections.abc import Callable, Mapping
from typing import Any

from patchclamp import neurons, requests
from patchclamp.cli.detach import add_detach_argument, job_outcome
from patchclamp.cli.naming import add_naming_arguments, naming_options
from patchclamp.cli.neurons.drawing import layer_lines
from patchclamp.cli.neurons.selection import add_layers_argument, add_site_argument, layers_of
from patchclamp.cli.neurons.shown import add_picture_argument, note_stored_set, show_best, write_picture
from patchclamp.cli.neurons.texts import add_text_arguments, facts_file, texts_of
from patchclamp.cli.options import add_model_argument, connection_options, given
from patchclamp.cli.parser import count, seed
from patchclamp.cli.terminal import heading, note, print_json, table
from patchclamp.client import Client
from patchclamp.names import NEURON_POOLINGS, NEURON_RANKERS
from patchclamp.neurons import LocalizationMethod
from patchclamp.pictures.neurons import layer_scores_figure
from patchclamp.results import LocalizedNeurons, LocalizedSet

METHODS: Mapping[str, Callable[..., LocalizationMethod]] = {
    each.__name__: each
    for each in (
        neurons.average_precision,
        neurons.activation_entropy,
        neurons.gradient_times_activation,
        neurons.integrated_gradients,
        neurons.welch_t,
        neurons.contrast_set,
        neurons.sparse_probe,
    )
}
# Options that belong to some methods only, by the names of their arguments.
_GRADIENTS = ("gradient_times_activation", "integrated_gradients")
_OF_METHODS = (
    "contrast",
    "pooling",
    "threshold",
    "activity",
    "facts",
    "controls",
    "all_tokens",
    "max_steps",
    "completeness",
    "z",
    "subsets",
    "agreement",
    "k",
    "ranker",
    "by_layer",
)


def add_parser(actions: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    parser = actions.add_parser(
        "localize",
        parents=[connection_options(timeout=math.inf)],
        help="neurons of a relation, a language, a kind of text or a fact",
    )
    parser.add_argument("method", choices=METHODS)
    parser.add_argument("name", nargs="?", help="tag to store the set under")
    add_text_arguments(parser, required=False)
    _add_method_arguments(parser)
    add_layers_argument(parser)
    add_site_argument(parser, "mlp_post")
    size = parser.add_mutually_exclusive_group()
    size.add_argument("--top", type=count, metavar="K", help="neurons of the set (default: the method's)")
    size.add_argument("--share", type=float, help="instead: of all neurons of the layers")
    parser.add_argument("--holdout-fraction", type=float, metavar="SHARE", help="of the texts, for the evidence")
    parser.add_argument("--random-sets", type=count, default=0, metavar="N", help="of equal size (default: 20)")
    parser.add_argument("--seed", type=seed, default=0)
    add_naming_arguments(parser)
    add_detach_argument(parser)
    add_model_argument(parser)
    add_picture_argument(parser, "picture of the scores of each layer")
    parser.set_defaults(run=run)


def _add_method_arguments(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("of the method")
    group.add_argument(
        "--target", action="append", default=[], metavar="LABEL", help="whose neurons are sought; entropy takes several"
    )
    group.add_argument("--contrast", metavar="LABEL", help="welch_t, contrast_set: compared with (default: all others)")
    group.add_argument("--pooling", choices=NEURON_POOLINGS, help="tokens of a text that count")
    group.add_argument("--threshold", type=float, help="entropy: active above it (default: 0)")
    group.add_argument("--activity", type=float, metavar="QUANTILE", help="entropy: to be reached (default: 0.95)")
    group.add_argument("--facts", type=facts_file, metavar="FILE", help="gradients: .jsonl of prompt, answer; or .tsv")
    group.add_argument("--controls", type=facts_file, metavar="FILE", help="gradients: facts of other things")
    group.add_argument("--all-tokens", action="store_true", default=None, help="gradients: summed over the prompt")
    group.add_argument("--max-steps", type=count, metavar="N", help="integrated gradients (default: 64)")
    group.add_argument("--completeness", type=float, metavar="GAP", help="integrated gradients (default: 0.01)")
    group.add_argument("--z", type=float, help="contrast_set: deviations (default: 3)")
    group.add_argument("--subsets", type=count, metavar="N", help="contrast_set (default: 5)")
    group.add_argument("--agreement", type=count, metavar="N", help="contrast_set: of the subsets (default: all)")
    group.add_argument("--k", type=count, nargs="+", metavar="K", help="sparse_probe: neurons of the probes")
    group.add_argument("--ranker", choices=NEURON_RANKERS, help="sparse_probe (default: mean_difference)")
    group.add_argument("--by-layer", action="store_true", default=None, help="sparse_probe: probes of each layer too")


def method_of(args: argparse.Namespace) -> LocalizationMethod:
    """Returns the method with its settings. ValueError for settings of another method, and for those it lacks."""
    build = METHODS[args.method]
    accepted = inspect.signature(build).parameters
    settings: dict[str, Any] = given(args, *_OF_METHODS)
    for name in settings:
        if name not in accepted:
            raise ValueError(f"--{name.replace('_', '-')} is no option of {args.method}")
    if "texts" in accepted:
        settings["texts"] = texts_of(args)
    elif given(args, "texts", "corpus", "data") or args.target:
        raise ValueError(f"{args.method} takes --facts, and neither texts nor a target")
    elif args.facts is None:
        raise ValueError(f"{args.method} needs --facts FILE")
    if "targets" in accepted:
        settings["targets"] = args.target
    elif "target" in accepted:
        if len(args.target) != 1:
            raise ValueError(f"{args.method} needs one --target LABEL")
        [settings["target"]] = args.target
    return build(**settings)


def run(args: argparse.Namespace) -> int:
    tags = () if args.name is None else (args.name,)
    options = {
        **given(args, "site", "share", "holdout_fraction", "model"),
        "top_k": args.top,
        "layers": layers_of(args),
        "random_sets": args.random_sets,
        "seed": args.seed,
        **naming_options(args, *tags),
    }
    result = job_outcome(args, Client.localize_neurons, requests.localize_neurons, method_of(args), **options)
    if result is not None:
        show(args, result)
    return 0


def show(args: argparse.Namespace, result: LocalizedNeurons) -> None:
    if args.json:
        print_json(result)
    else:
        _show(args, result)
    if args.picture is not None and result.sets:
        best = result.sets[0]
        title = f"{args.method}: {best.label or args.name or 'facts'}"
        write_picture(args, layer_scores_figure(_layers(best), best.layer_max, best.layer_mean, title))


def _show(args: argparse.Namespace, result: LocalizedNeurons) -> None:
    # Gradients are judged on the facts that they are from, which `measure` says; there is nothing held out.
    of_facts = not any(found.label for found in result.sets)
    for found in result.sets:
        heading(found.label or "facts")
        show_best(found.stored, "score")
        print()
        for line in layer_lines(_layers(found), found.layer_max, found.layer_mean):
            print(line)
        if found.measure:
            measured = found.measure if of_facts else f"{found.measure}, held out"
            print(
                f"{measured}: {found.heldout:.4f}; of {len(found.random)} random sets "
                f"{found.random_mean:.4f} ± {found.random_deviation:.4f}"
            )
        print()
    if result.probes:
        _show_probes(result)
    if result.steps:
        print(f"{result.steps} steps, completeness gap {result.completeness_gap:.4f}")
    for warning in result.warnings:
        note(f"warning: {warning}")
    controls = ", controls among them" if of_facts and args.controls else ""
    note(f"{result.texts} {'facts' if of_facts else 'texts'}{controls}, {result.tokens} tokens")
    for found in result.sets:
        note_stored_set(found.stored)


def _show_probes(result: LocalizedNeurons) -> None:
    rows = [
        (
            each.k,
            "all" if each.layer is None else each.layer,
            f"{each.f1:.3f}",
            f"{each.precision:.3f}",
            f"{each.recall:.3f}",
            f"{each.random_f1_mean:.3f} ± {each.random_f1_deviation:.3f}",
        )
        for each in result.probes
    ]
    table(("k", "layer", "F1", "precision", "recall", "F1 of random neurons"), rows)


def _layers(found: LocalizedSet) -> list[int]:
    """Returns the layers that the scores by layer belong to, which the card of a stored set names."""
    layers = found.stored.artifact.evidence.get("layers")
    return [int(each["layer"]) for each in layers] if layers else list(range(len(found.layer_max)))
