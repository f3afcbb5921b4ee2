"""patchclamp score"""

import argparse

from patchclamp.cli.generate import print_confidence, print_logprobs
from patchclamp.cli.options import (
    add_confidence_arguments,
    add_prompt_arguments,
    confidence_of,
    connect,
    connection_options,
    prompt_of,
)
from patchclamp.cli.parser import count
from patchclamp.cli.sparse_spec import add_sparsity_arguments, sparsity_of
from patchclamp.cli.steering import add_steering_arguments, program_of
from patchclamp.cli.terminal import note, print_json


def add_parser(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    parser = commands.add_parser(
        "score", parents=[connection_options()], help="log-probabilities of a given continuation"
    )
    add_prompt_arguments(parser)
    add_steering_arguments(parser)
    parser.add_argument("continuation", help="text to score after the prompt")
    parser.add_argument("--logprobs", type=count, default=0, metavar="N", help="also the N likeliest at each position")
    add_sparsity_arguments(parser, with_guard=False)
    add_confidence_arguments(parser)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    with connect(args) as client:
        result = client.score(
            prompt_of(args),
            args.continuation,
            model=args.model,
            program=program_of(args),
            top_logprobs=args.logprobs,
            sparsity=sparsity_of(args),
            confidence=confidence_of(args),
        )
    if args.json:
        print_json(result)
        return 0
    print_logprobs(result.tokens)
    print(f"total log-probability {result.total_logprob:.4f}, perplexity {result.perplexity:.4f}")
    if result.confidence is not None:
        print_confidence(result.confidence)
    note(result.receipt)
    if result.sparsity is not None:
        note(result.sparsity)
    if result.confidence is not None:
        note(result.confidence)
    return 0
