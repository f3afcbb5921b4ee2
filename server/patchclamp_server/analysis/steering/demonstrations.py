"""Demonstrations of a task as a prompt: a line "input => output" each, then the input that is asked about.

    ↵a => b↵c => d↵e =>

Every line begins with the line break, also the first: where a tokenizer puts nothing before a text, the first token is
an attention sink, and an input that is one cannot be read. Without it, no state made SmolLM2-135M name a capital.
"""

import random
from collections.abc import AsyncGenerator, Callable, Sequence
from contextlib import aclosing
from dataclasses import dataclass
from typing import TypeAlias

import torch
from torch import Tensor

from patchclamp_server.analysis.activations import collect
from patchclamp_server.engine.engine import Engine
from patchclamp_server.engine.request import Capture
from patchclamp_server.interventions.pooling import Pooling
from patchclamp_server.interventions.program import Scope, TokenSelector
from patchclamp_server.model.sites import Site

# (text, field of the request) → token ids with what the tokenizer puts around a text.
Encode: TypeAlias = Callable[[str, str], tuple[int, ...]]
LAST = Scope((TokenSelector(last_k=1),))


@dataclass(frozen=True)
class Demonstration:
    input: str
    output: str


def prompt(shown: Sequence[Demonstration], asked: str) -> str:
    """Returns the text in which `asked` follows what is shown."""
    return "".join(f"\n{each.input} => {each.output}" for each in shown) + f"\n{asked} =>"


def shots(among: Sequence[Demonstration], n: int, draw: random.Random) -> list[Demonstration]:
    """Returns n of them, or all where there are fewer, in a random order."""
    return draw.sample(list(among), min(n, len(among)))


def deranged(demonstrations: Sequence[Demonstration], draw: random.Random) -> list[Demonstration]:
    """Returns the same inputs in their order, each with the output of another one: of a random cycle through all."""
    cycle = list(range(len(demonstrations)))
    draw.shuffle(cycle)
    outputs = {cycle[i]: demonstrations[cycle[i - 1]].output for i in range(len(cycle))}
    return [Demonstration(each.input, outputs[i]) for i, each in enumerate(demonstrations)]


async def last_states(
    engine: Engine, prompts: Sequence[tuple[int, ...]], site: Site, layers: tuple[int, ...]
) -> AsyncGenerator[Tensor, None]:
    """Yields the state [layers, d] of the very last token of each prompt, sink or not."""
    capture = Capture(site, layers, Pooling.LAST_TOKEN, LAST)
    async with aclosing(collect(engine, prompts, capture)) as collected:
        async for _, pooled in collected:
            yield pooled.values


def norms(states: Sequence[Tensor]) -> Tensor:
    """Returns the mean norm [layers] of states [layers, d]."""
    return torch.stack([state.norm(dim=-1) for state in states]).mean(dim=0)
