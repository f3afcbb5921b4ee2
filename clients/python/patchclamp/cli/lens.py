"""patchclamp lens"""

import argparse
import math
from collections.abc import Sequence

from patchclamp.cli.options import add_prompt_arguments, connect, connection_options, prompt_of
from patchclamp.cli.parser import count
from patchclamp.cli.steering import add_steering_arguments, layer_list, program_of
from patchclamp.cli.terminal import print_json, quoted, table
from patchclamp.client import Client
from patchclamp.names import SiteName
from patchclamp.places import listed_places
from patchclamp.programs import Program, last, read_logit_lens
from patchclamp.results import ReadoutValue
from patchclamp.v1 import program_pb2 as pb

_SITES: dict[str, SiteName] = {"state": "resid_post", "attention": "attn_out", "mlp": "mlp_out"}


def add_parser(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    parser = commands.add_parser(
        "lens",
        parents=[connection_options()],
        help="what each layer says of the token after a prompt, and what its parts add to the logits",
    )
    add_prompt_arguments(parser)
    add_steering_arguments(parser)
    parser.add_argument(
        "--token",
        action="append",
        default=[],
        metavar="TEXT",
        help='a text whose first token is read, such as " Paris": its log-probability by layer, and what attention and '
        "the MLP add to its logit; repeatable (default: the likeliest tokens by layer)",
    )
    parser.add_argument("--neurons", type=neurons, metavar="L25N95,L25N173", help="read what single neurons add")
    parser.add_argument("--layers", type=layer_list, default="all", help="such as 8-12 (default: %(default)s)")
    parser.add_argument("--top", type=count, default=5, metavar="K", help="tokens without --token (default: 5)")
    parser.set_defaults(run=run)


def neurons(text: str) -> dict[int, list[int]]:
    """Reads L25N95,L25N173, and returns the neurons of each layer."""
    places = listed_places(text, "N")
    if places is None:
        raise argparse.ArgumentTypeError(f"{text!r}: expected neurons such as L25N95,L25N173")
    return {layer: [number for own, number in places if own == layer] for layer, _ in sorted(places)}


def run(args: argparse.Namespace) -> int:
    with connect(args) as client:
        ids = [_first_token(client, text, args.model) for text in args.token]
        program = Program(program_of(args).edits, readouts=_readouts(args, ids))
        result = client.generate(prompt_of(args), program=program, model=args.model, max_tokens=1).result()
    values = result.prompt_readouts
    if args.json:
        print_json(values)
    elif args.neurons:
        _show_neurons(args.neurons, values)
    elif ids:
        _show_tokens(args.token, values)
    else:
        table(("layer", "likeliest"), [(value.layer, _probabilities(value)) for value in values])
    return 0


def _first_token(client: Client, text: str, model: str) -> int:
    """Returns the first token of the text, behind what the tokenizer puts before every prompt."""
    found = client.tokenize(text, model=model)
    for token, piece in zip(found.ids, found.pieces, strict=True):
        # Some tokenizers put a space before a text, or take one away.
        if piece and (text.startswith(piece) or (piece.strip() and text.lstrip().startswith(piece.lstrip()))):
            return token
    raise ValueError(f"--token {text!r}: it begins with no token that has a text; its tokens are {found.pieces}")


def _readouts(args: argparse.Namespace, ids: list[int]) -> list[pb.Readout]:
    asked = {"token_ids": ids} if ids else {"k": args.top}
    if args.neurons:
        return [
            read_logit_lens(**asked, neurons=own, layers=layer, scope=last(1), name=f"L{layer}")
            for layer, own in args.neurons.items()
        ]
    sites = _SITES if ids else {"state": _SITES["state"]}
    return [
        read_logit_lens(**asked, site=site, layers=args.layers, scope=last(1), name=name)
        for name, site in sites.items()
    ]


def _show_tokens(texts: Sequence[str], values: Sequence[ReadoutValue]) -> None:
    """Prints a row for each layer: of each token the log-probability, and what is added to the logit."""
    header = ["layer"]
    for text in texts:
        header += [f"{quoted(text)} log p", "attention adds", "MLP adds"]
    at = {(value.layer, value.name): value.values for value in values}
    rows = []
    for layer in sorted({value.layer for value in values}):
        each = zip(*(at[layer, name] for name in _SITES), strict=True)
        rows.append((layer, *(f"{number:+.3f}" for of_token in each for number in of_token)))
    table(header, rows)


def _show_neurons(asked: dict[int, list[int]], values: Sequence[ReadoutValue]) -> None:
    rows = []
    for value in values:
        own = asked[value.layer]
        share = len(value.values) // len(own)
        for i, number in enumerate(own):
            part = slice(i * share, (i + 1) * share)
            added = zip(value.texts[part], value.values[part], strict=True)
            shown = "  ".join(f"{quoted(text)} {logit:+.3f}" for text, logit in added)
            rows.append((f"L{value.layer}N{number}", shown))
    table(("neuron", "adds"), rows)


def _probabilities(value: ReadoutValue) -> str:
    pairs = zip(value.texts, value.values, strict=True)
    return "  ".join(f"{quoted(text)} {math.exp(logprob):.3f}" for text, logprob in pairs)
