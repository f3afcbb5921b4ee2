"""patchclamp sparsity evaluate"""

import argparse
import math
from collections.abc import Sequence

from patchclamp import requests
from patchclamp.cli.detach import add_detach_argument, job_outcome
from patchclamp.cli.options import connection_options
from patchclamp.cli.sparse_spec import Spec, spec
from patchclamp.cli.sparsity.texts import add_text_arguments, text_options, texts_of
from patchclamp.cli.terminal import note, print_json, table
from patchclamp.client import Client
from patchclamp.results import QualityCard, SparsityEvaluation

CARD_HEADER = ("perplexity ratio", "KL", "top-1", "sparsity", "bytes read")


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
    evaluations = job_outcome(
        args,
        Client.evaluate_profile,
        requests.evaluate_profile,
        sparsities,
        texts_of(args),
        measure_speed=args.speed,
        **text_options(args),
    )
    if evaluations is None:
        return 0
    if args.json:
        # `sparsity plot` reads these.
        print_json([{"spec": specs[each.index].text, **each.to_dict()} for each in evaluations])
        return 0
    _print_table(specs, evaluations)
    card = evaluations[0].quality
    note(f"{card.scored_tokens} tokens of {card.documents} documents; dense perplexity {card.dense_perplexity:.2f}")
    return 0


def card_cells(card: QualityCard) -> tuple[str, ...]:
    """Returns the cells of a quality card, under CARD_HEADER."""
    return (
        f"{card.perplexity_ratio:.4f}",
        f"{card.divergence:.4f}",
        f"{card.top1_agreement:.3f}",
        f"{card.sparsity:.3f}",
        f"{card.bytes_read_16:.3f}",
    )


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
