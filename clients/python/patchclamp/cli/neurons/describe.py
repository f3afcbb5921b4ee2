"""patchclamp neurons describe"""

import argparse
import math

from patchclamp import requests
from patchclamp.cli.detach import add_detach_argument, job_outcome
from patchclamp.cli.neurons.selection import add_neurons_argument, add_site_argument
from patchclamp.cli.neurons.texts import add_text_arguments, texts_of
from patchclamp.cli.options import add_model_argument, connection_options, given
from patchclamp.cli.parser import count, seed
from patchclamp.cli.terminal import heading, print_json, quoted, table
from patchclamp.client import Client
from patchclamp.results import NeuronContext, NeuronDescription


def add_parser(actions: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    parser = actions.add_parser(
        "describe",
        parents=[connection_options(timeout=math.inf)],
        help="contexts in which neurons are largest, and scores of descriptions",
    )
    add_neurons_argument(parser)
    add_text_arguments(parser)
    add_site_argument(parser, "mlp_post")
    parser.add_argument("--contexts", type=count, default=0, metavar="N", help="of each neuron (default: 10)")
    parser.add_argument("--context-tokens", type=count, metavar="N", help="before and after (default: 12)")
    parser.add_argument("--description", action="append", default=[], metavar="TEXT", help="a candidate; repeatable")
    parser.add_argument("--causal", action="store_true", help="score them by clamping the neurons too")
    parser.add_argument("--random-neurons", type=count, default=0, metavar="N", help="beside it (default: 20)")
    parser.add_argument("--seed", type=seed, default=0)
    add_detach_argument(parser)
    add_model_argument(parser)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    options = {
        **given(args, "site", "context_tokens", "model"),
        "top_k": args.top,
        "contexts": args.contexts,
        "descriptions": args.description,
        "causal": args.causal,
        "random_neurons": args.random_neurons,
        "seed": args.seed,
    }
    arguments = (args.neurons, texts_of(args))
    described = job_outcome(args, Client.describe_neurons, requests.describe_neurons, *arguments, **options)
    if described is not None:
        show(args, described)
    return 0


def show(args: argparse.Namespace, described: tuple[NeuronDescription, ...]) -> None:
    if args.json:
        print_json(described)
        return
    for each in described:
        _show(each)


def _show(description: NeuronDescription) -> None:
    heading(str(description.neuron))
    print(
        f"above 0 at {description.rate:.2%} of {description.tokens_seen:,} tokens, "
        f"mean {description.mean:.4g}, largest {description.max:.4g}"
    )
    table(("value", "context"), [(f"{each.value:.4g}", marked(each)) for each in description.contexts])
    if description.scores:
        print()
        rows = [
            (each.description, f"{each.pmi:+.4f}", _number(each.causal, "+.4f"), _number(each.causal_z, "+.2f"))
            for each in description.scores
        ]
        table(("description", "pmi", "causal", "z"), rows)
    print()


def marked(context: NeuronContext) -> str:
    """Returns the text of a context with its largest token in brackets."""
    largest = max(range(len(context.tokens)), key=lambda i: context.tokens[i].value, default=-1)
    pieces = (f"[{token.text}]" if i == largest else token.text for i, token in enumerate(context.tokens))
    return quoted("".join(pieces))


def _number(value: float | None, form: str) -> str:
    return "" if value is None else format(value, form)
