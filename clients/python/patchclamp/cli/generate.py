"""patchclamp generate"""

import argparse
import math
from dataclasses import replace
from typing import cast

from patchclamp.cli.options import (
    add_generation_arguments,
    connect,
    connection_options,
    generate_options,
    given,
    prompt_of,
)
from patchclamp.cli.parser import count
from patchclamp.cli.terminal import heading, note, print_json, quoted, table
from patchclamp.requests import GenerateOptions
from patchclamp.results import ConfidenceReport, GenerateResult, RequestWarning, Token


def add_parser(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    parser = commands.add_parser(
        "generate",
        parents=[connection_options(timeout=math.inf)],
        help="stream text, steered or not, and print the receipt",
    )
    add_generation_arguments(parser)
    parser.add_argument("--samples", type=count, metavar="N", help="draw N samples, each with a seed of its own")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    options: GenerateOptions = {**generate_options(args), **cast(GenerateOptions, given(args, "samples"))}
    with connect(args) as client, client.generate(prompt_of(args), **options) as stream:
        if args.json:
            print_json(stream.result())
            return 0
        if args.samples is not None and args.samples > 1:
            print_samples(stream.result())
            return 0
        told: tuple[RequestWarning, ...] = ()
        for chunk in stream:
            for warning in chunk.warnings:
                note(warning)
            told += chunk.warnings
            print(chunk.text, end="", flush=True)
        print()
        result = stream.result()
    if args.logprobs is not None or result.prompt_tokens:
        print_logprobs((*result.prompt_tokens, *(result.tokens if args.logprobs is not None else ())))
    if result.confidence is not None:
        print_confidence(result.confidence)
    print_ending(result, told)
    return 0


def print_samples(first: GenerateResult) -> None:
    """Prints each when all have ended: they come at the same time."""
    for number, sample in enumerate((first, *first.others)):
        heading(f"sample {number}")
        print(sample.text)
        print_ending(sample)


def print_logprobs(tokens: tuple[Token, ...]) -> None:
    rows = [
        (
            token.position,
            quoted(token.text),
            token.id,
            _logprob(token.logprob),
            "  ".join(f"{quoted(top.text)} {_logprob(top.logprob)}" for top in token.top_logprobs),
        )
        for token in tokens
    ]
    table(("position", "token", "id", "logprob", "likeliest"), rows)


def print_confidence(report: ConfidenceReport) -> None:
    """Prints what each layer would have said."""
    print()
    heading("confidence by layer")
    own = [option.probability for option in report.options if option.probability]
    columns = zip(report.layers, report.layer_agreement, report.layer_probability, *own, strict=True)
    rows = [(layer, f"{agreement:.1%}", *(f"{share:.4f}" for share in shares)) for layer, agreement, *shares in columns]
    names = [quoted(option.option) for option in report.options] if own else []
    table(("layer", "agrees", "token", *names), rows)


def print_ending(result: GenerateResult, told: tuple[RequestWarning, ...] = ()) -> None:
    """Prints the receipt without the warnings that stand there already, the reports and the usage.

    They go to stderr, so that the text alone can be redirected.
    """
    note(replace(result.receipt, warnings=tuple(w for w in result.receipt.warnings if w not in told)))
    if result.sparsity is not None:
        note(result.sparsity)
    if result.confidence is not None:
        note(result.confidence)
    note(f"{result.finish_reason}; {result.usage}; seed {result.seed}")


def _logprob(value: float | None) -> str:
    return "" if value is None else f"{value:.4f}"
