"""What is run: cases, how many tokens and rounds each peer gets, and the programs of their requests.

Rounds of a peer that computes in float32 with torch take ten times as long as those of llama.cpp and of ours, so it has
fewer tokens and rounds: the medians say of how many they are.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from peers.environments import LLAMA, OURS

Program = dict[str, int] | None
Prompts = list[list[int]]

# Tokens of the prompts of decode cases: with the tokens that come after them, a context of 16 and a little more.
PROMPT = 16
BATCHES = (1, 8, 16, 64)
STEERING = ("unsteered", "one layer", "all layers", "programs")
PREFILLS = (512, 2048)
# The context of the model is 8,192: room is left for the tokens that are decoded.
LONGEST = 8128
READ = 512
# Of different programs, a peer that runs them one after the other runs so many: the rate is that of any number.
ONE_BY_ONE = 4
# Peers that a round of every case does not take minutes of.
QUICK_PEERS = (OURS, LLAMA)


@dataclass(frozen=True)
class Effort:
    """Tokens a request and rounds."""

    tokens: int
    rounds: int


@dataclass(frozen=True)
class Case:
    """`kind`: "decode" (rate of `name`), "context" (rates of the prompt and of decoding after it), "read", and for us
    alone "edited" and "sparse"."""

    name: str
    kind: str
    quick: Effort
    slow: Effort
    batch: int = 1
    steering: str = "unsteered"
    length: int = PROMPT
    policy: str = ""

    def effort(self, peer: str) -> Effort:
        return self.quick if peer in QUICK_PEERS else self.slow

    @property
    def peers(self) -> tuple[str, ...] | None:
        """None: all."""
        return (OURS,) if self.kind in ("edited", "sparse") else None


# By batch: quick peers, slow peers.
_DECODE = {
    1: (Effort(64, 9), Effort(12, 2)),
    8: (Effort(32, 5), Effort(8, 2)),
    16: (Effort(24, 7), Effort(8, 1)),
    64: (Effort(16, 3), Effort(6, 1)),
}
_SPARSE = (Effort(64, 3), Effort(64, 3))
# By context.
_CONTEXT = {
    512: (Effort(8, 5), Effort(4, 2)),
    2048: (Effort(32, 3), Effort(8, 1)),
    LONGEST: (Effort(32, 1), Effort(8, 1)),
}
EDITED = "decode 16 edited"


def brief(found: Sequence[Case]) -> list[Case]:
    """For a smoke run: short prompts, few tokens, one round."""
    shortest = Effort(4, 1)
    return [
        replace(case, quick=shortest, slow=shortest, batch=min(case.batch, 8), length=min(case.length, 128))
        for case in found
    ]


def decode_name(batch: int, steering: str) -> str:
    return f"decode {batch} {steering}"


def cases(policies: Sequence[str] = ()) -> list[Case]:
    """In the order of a round: what is compared with each other stands together, the longest last."""
    found = []
    for batch in BATCHES:
        found += [
            Case(decode_name(batch, steering), "decode", *_DECODE[batch], batch=batch, steering=steering)
            for steering in STEERING
            if batch > 1 or steering != "programs"
        ]
        if batch == 1:
            found += [Case(f"sparse {policy}", "sparse", *_SPARSE, policy=policy) for policy in policies]
        if batch == 16:
            found.append(Case(EDITED, "edited", *_DECODE[batch], batch=batch))
    found.append(Case(f"read {READ}", "read", Effort(1, 3), Effort(1, 2), length=READ))
    found += [Case(f"context {length}", "context", *_CONTEXT[length], length=length) for length in _CONTEXT]
    return found


def vectors(width: int, n_layers: int) -> np.ndarray[Any, Any]:
    """float32 [n_layers + 64, width]: rows for the program of all layers, and one for each of 64 programs."""
    rows = np.random.default_rng(0).standard_normal((n_layers + 64, width)).astype(np.float32)
    # Of all layers each is a smaller push.
    rows[:n_layers] *= STRENGTH / n_layers**0.5
    rows[n_layers:] *= STRENGTH
    return rows


# Of a vector's numbers, in units of the residual stream.
STRENGTH = 0.5


def programs(steering: str, batch: int, n_layers: int) -> list[Program]:
    """Of a batch. The first layer is left alone: llama.cpp cannot control it."""
    if steering == "unsteered":
        return [None] * batch
    if steering == "one layer":
        return [{str(n_layers // 2): n_layers}] * batch
    if steering == "all layers":
        return [{str(layer): layer for layer in range(1, n_layers)}] * batch
    return [{str(1 + i % (n_layers - 1)): n_layers + i} for i in range(batch)]


def prompts(ids: Sequence[int], batch: int, length: int) -> Prompts:
    """Different parts of a text, one behind the other, as often as it takes."""
    needed = batch * length
    text = list(ids) * (-(-needed // len(ids)))
    return [text[i * length : (i + 1) * length] for i in range(batch)]
