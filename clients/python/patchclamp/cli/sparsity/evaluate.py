"""patchclamp sparsity evaluate"""

import argparse
import math
from collections.abc import Sequence

from patchclamp import requests
from patchclamp.cli.jobs import add_detach_argument, detach
from patchclamp.cli.options import connect, connection_options
from patchclamp.cli.sparse_spec import Spec, spec
from patchclamp.cli.sparsity.cards import CARD_HEADER, card_cells
from patchclamp.cli.sparsity.texts import add_text_arguments, text_options, texts_of
from patchclamp.cli.terminal import job_result, note, print_json, table
from patchclamp.results import SparsityEvaluation


def add_parser(actions: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    parser = actions.add_parser(
        "evaluate",
        parents=[connection_options(timeout=math.inf)],
        help="quality and speed against the dense model, beside random sets",
    )
    parser.add_argument("specs", type=spec, nargs="+", metavar="PROFILE|POLICY[:SETTING,...]")
    parser.add_argument("--keep", type=float, nargs="+", default=[], metavar="RATIO", help="every policy at each")
    add_text_arguments(parser)
    parser.add_argument("--speed", action="store_true", help="also time decoding, dense and sparse by turns")
    add_detach_argument(parser)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    given: list[Spec] = args.specs
    specs = [each.with_keep(keep) for each in given for keep in args.keep] if args.keep else given
    sparsities = [each.sparsity for each in specs]
    if args.detach:
        return detach(
            args, requests.evaluate_profile(sparsities, texts_of(args), measure_speed=args.speed, **text_options(args))
        )
    with (
        connect(args) as client,
        client.evaluate_profile(
            sparsities, texts_of(args), measure_speed=args.speed, timeout=args.timeout, **text_options(args)
        ) as stream,
    ):
        evaluations = job_result(stream, quiet=args.json)
    if args.json:
        # `sparsity plot` reads these.
        print_json([{"spec": specs[each.index].text, **each.to_dict()} for each in evaluations])
        return 0
    _print_table(specs, evaluations)
    card = evaluations[0].quality
    note(f"{card.scored_tokens} tokens of {card.documents} documents; dense perplexity {card.dense_perplexity:.2f}")
    return 0


def _print_table(specs: Sequence[Spec], evaluations: Sequence[SparsityEvaluation]) -> None:
    timed = any(each.speed is not None for each in evaluations)
    rows = [
        (
            specs[each.index].text,
            f"{each.keep_ratio:g}",
            *card_cells(each.quality),
            f"{each.random_control.perplexity_ratio:.4f}",
            *([f"{each.speed.speedup:.2f}" if each.speed else ""] if timed else []),
        )
        for each in evaluations
    ]
    table(("sparsity", "keep", *CARD_HEADER, "random set", *(["speed-up"] if timed else [])), rows)
