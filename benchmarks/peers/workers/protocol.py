"""What every worker speaks: a JSON object a line on standard input, and one line of answer to each.

    {"do": "decode", "prompts": ..., ...}  →  {"ok": ...} | {"cannot": "why"} | {"error": "what was raised"}

A worker runs in the interpreter of its peer, which has nothing of ours, so this imports numpy at most. Times are those
of the worker's clock around the peer's own calls. A program is {layer: row}: the row of the file of vectors is added to
the residual stream after that layer (resid_post), at every token. Layers are strings, as JSON has them.
"""

import json
import os
import sys
import time
import traceback
from typing import Any, Protocol

Program = dict[str, int] | None


class Cannot(Exception):
    """The peer has no way to do that; the text says why."""


class Peer(Protocol):
    def load(self, model: str, vectors: str | None, threads: int) -> dict[str, Any]:
        """Makes everything ready to run. Returns "versions", by package, and "settings", in words.

        vectors: a .npy file, float32 [rows, d_model], that programs name rows of.
        """

    def decode(self, prompts: list[list[int]], tokens: int, programs: list[Program], one_by_one: int) -> dict[str, Any]:
        """Greedy, exactly `tokens` tokens for each prompt, whatever ends a text. Prompts are of one length.

        Returns "prefill_seconds", until every prompt has its first token, "decode_seconds" from there on, the number of
        tokens that came in them ("decoded"), the "tokens" themselves and "how" in words. Where programs differ and the
        peer cannot run them together it runs the first `one_by_one` of them one after the other.
        """

    def logits(self, prompt: list[int], program: Program, path: str) -> dict[str, Any]:
        """Writes float32 [tokens - 1, vocabulary], the logits (or log-probabilities) after each token but the last."""

    def read(self, prompt: list[int], layers: int, path: str | None) -> dict[str, Any]:
        """Reads resid_post of every layer and token. Returns "seconds" until all are float32 [layers, tokens, d_model]
        in the memory of the process. Writes them where there is a path."""


class Clock:
    """When tokens came: `tick` is called once for each step of a batch."""

    def __init__(self) -> None:
        self.started = time.perf_counter()
        self.times: list[float] = []

    def tick(self) -> None:
        self.times.append(time.perf_counter())

    def seconds(self, batch: int) -> dict[str, Any]:
        """Of a batch whose sequences get a token in every step."""
        first, last = self.times[0], self.times[-1]
        decoded = batch * (len(self.times) - 1)
        return {"prefill_seconds": first - self.started, "decode_seconds": last - first, "decoded": decoded}


def same(programs: list[Program]) -> bool:
    return all(each == programs[0] for each in programs)


def together(runs: list[dict[str, Any]]) -> dict[str, Any]:
    """One answer for prompts that were run one after the other."""
    sums = {name: sum(run[name] for run in runs) for name in ("prefill_seconds", "decode_seconds", "decoded")}
    return sums | {"tokens": [row for run in runs for row in run["tokens"]], "how": "one after the other"}


def serve(peer: Peer) -> None:
    """Answers until standard input ends."""
    # What libraries print must not come between the answers.
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    for line in sys.stdin:
        asked = json.loads(line)
        try:
            answer = {"ok": getattr(peer, asked.pop("do"))(**asked)}
        except Cannot as reason:
            answer = {"cannot": str(reason)}
        except Exception as error:
            # Whatever the peer's library raises is its result for this case, and not the end of the others.
            traceback.print_exc()
            answer = {"error": f"{type(error).__name__}: {error}"}
        answers.write(json.dumps(answer) + "\n")
        answers.flush()
