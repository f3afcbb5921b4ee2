"""patchclamp generate"""

import argparse

from patchclamp.cli.options import (
    add_prompt_arguments,
    add_sampling_arguments,
    connect,
    connection_options,
    generate_options,
    prompt_of,
)
from patchclamp.cli.sparse_spec import add_sparsity_arguments
from patchclamp.cli.terminal import note, print_json, table
from patchclamp.requests import GenerateOptions
from patchclamp.results import GenerateResult, Token


def add_parser(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    parser = commands.add_parser(
        "generate", parents=[connection_options()], help="stream text, steered or not, and print the receipt"
    )
    add_prompt_arguments(parser)
    add_sampling_arguments(parser)
    add_sparsity_arguments(parser)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    options: GenerateOptions = generate_options(args)
    with connect(args) as client, client.generate(prompt_of(args), **options) as stream:
        if args.json:
            print_json(stream.result())
            return 0
        for piece in stream.text:
            print(piece, end="", flush=True)
        print()
        result = stream.result()
    if args.logprobs is not None:
        print_logprobs(result.tokens)
    print_ending(result)
    return 0


def print_logprobs(tokens: tuple[Token, ...]) -> None:
    rows = [
        (t.position, t.id, _logprob(t.logprob), "  ".join(f"{i}:{_logprob(p)}" for i, p in t.top_logprobs))
        for t in tokens
    ]
    table(("position", "token", "logprob", "likeliest"), rows)


def print_ending(result: GenerateResult) -> None:
    """Receipt, reports and usage; on stderr, so that the text alone can be redirected."""
    note(result.receipt)
    if result.sparsity is not None:
        note(result.sparsity)
    note(f"{result.finish_reason}; {result.usage}; seed {result.seed}")


def _logprob(value: float | None) -> str:
    return "" if value is None else f"{value:.4f}"
