"""patchclamp tokenize, patchclamp detokenize"""

import argparse

from patchclamp.cli.options import add_model_argument, add_prompt_arguments, connect, connection_options, prompt_of
from patchclamp.cli.parser import count
from patchclamp.cli.terminal import print_json, quoted, table


def add_parsers(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    tokenize = commands.add_parser("tokenize", parents=[connection_options()], help="the tokens of a prompt, as sent")
    add_prompt_arguments(tokenize)
    tokenize.set_defaults(run=run_tokenize)

    detokenize = commands.add_parser("detokenize", parents=[connection_options()], help="the text of token ids")
    detokenize.add_argument("ids", type=count, nargs="+", metavar="ID")
    form = detokenize.add_mutually_exclusive_group()
    form.add_argument("--pieces", action="store_true", help="the text of each token instead of the whole")
    form.add_argument("--skip-special-tokens", action="store_true", help="leave them out of the whole text")
    add_model_argument(detokenize)
    detokenize.set_defaults(run=run_detokenize)


def run_tokenize(args: argparse.Namespace) -> int:
    with connect(args) as client:
        found = client.tokenize(prompt_of(args), model=args.model)
    if args.json:
        print_json(found)
        return 0
    roles = found.roles or [""] * len(found.ids)
    rows = zip(range(len(found.ids)), map(quoted, found.pieces), found.ids, roles, strict=True)
    table(("position", "token", "id", "role"), list(rows))
    return 0


def run_detokenize(args: argparse.Namespace) -> int:
    with connect(args) as client:
        found = client.detokenize(args.ids, skip_special_tokens=args.skip_special_tokens, model=args.model)
    if args.json:
        print_json(found)
    elif args.pieces:
        table(("token", "id"), list(zip(map(quoted, found.pieces), args.ids, strict=True)))
    else:
        print(found.text)
    return 0
