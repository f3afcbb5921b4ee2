"""Products that take activations in 8 bits (serve --activations int8) against exact ones: quality and time.

    python benchmarks/activations.py [--only quality|speed] [--documents 3] [--tokens 1024] [--rounds 9]

- quality: documents of the Brown corpus that no calibration sees, each read as one prompt of the embedded model
  (cards.py).
- speed: steps of its decoder in alternating rounds, one token of 1, 8, 16 and 64 sequences, and a prompt of 512.

benchmarks/products.py compares the products alone. Writes benchmarks/results/activations.json; the last line is a JSON
object of it.
"""

from patchclamp_server.cpu.compiled_code import keep_compiled_code
from patchclamp_server.threads import configure_threads

configure_threads()
keep_compiled_code()

import argparse
import json
import time
from collections.abc import Callable
from statistics import median
from typing import Any

import torch
from brown import DESCRIPTION
from cards import Comparison, held_out
from measure import alternate, save
from torch import Tensor

from patchclamp_server.analysis.documents import BLOCK, inputs_of, pools_for
from patchclamp_server.model.attention.batch import AttentionBatch
from patchclamp_server.model.attention.spans import Span
from patchclamp_server.model.decoder import Decoder, StepInputs
from patchclamp_server.model.load import LoadedModel, load_model

WAYS: dict[str, torch.dtype | None] = {"float32": None, "int8": torch.int8}
STEP = 512
BATCHES = (1, 8, 16, 64)
# Tokens before the one that is decoded.
CONTEXT = 64


def quality(models: dict[str, LoadedModel], documents: int, tokens: int) -> dict[str, Any]:
    comparison = Comparison("float32", list(models))
    for document in held_out(models["float32"], documents, tokens):
        states = {way: last_states(model.decoder, document) for way, model in models.items()}
        comparison.add(document, states, {way: model.decoder.logits for way, model in models.items()})
    n = comparison.tokens
    return {"documents": documents, "tokens": n, "text": DESCRIPTION, "cards": comparison.cards()}


def last_states(decoder: Decoder, document: Tensor) -> Tensor:
    """The residual stream [T, d_model] at the end, of a prompt in steps."""
    tokens = document.shape[1]
    pools = pools_for(decoder, document)
    steps = [inputs_of(document, at, min(at + STEP, tokens), decoder) for at in range(0, tokens, STEP)]
    return torch.cat([decoder.forward(step, pools) for step in steps])


def speed(models: dict[str, LoadedModel], rounds: int) -> dict[str, Any]:
    rows: list[dict[str, Any]] = []
    for batch in BATCHES:
        cases = {way: decode_case(model.decoder, batch) for way, model in models.items()}
        rows.append({"case": "decode", "batch": batch} | compared(alternate(cases, rounds)))
    prompt = torch.arange(STEP)[None] * 7919 % models["float32"].decoder.spec.vocab_size
    cases = {way: prompt_case(model.decoder, prompt) for way, model in models.items()}
    rows.append({"case": "prompt", "batch": STEP} | compared(alternate(cases, rounds)))
    return {"rounds": rounds, "rows": rows}


def compared(seconds: dict[str, list[float]]) -> dict[str, Any]:
    ratios = [exact / rounded for exact, rounded in zip(seconds["float32"], seconds["int8"], strict=True)]
    return {
        "ms": {way: round(1e3 * median(own), 3) for way, own in seconds.items()},
        "least_ms": {way: round(1e3 * min(own), 3) for way, own in seconds.items()},
        "speedup": round(median(ratios), 3),
        "least_speedup": round(min(seconds["float32"]) / min(seconds["int8"]), 3),
    }


def decode_case(decoder: Decoder, batch: int) -> Callable[[], float]:
    """Steps of one token of each sequence, and its logits: the median of some."""
    pools = pools_for(decoder, torch.zeros(1, batch * (CONTEXT + BLOCK) + BLOCK))
    blocks = CONTEXT // BLOCK + 1
    tables = [list(range(1 + row * blocks, 1 + (row + 1) * blocks)) for row in range(batch)]

    def step_of(first: int, n: int) -> StepInputs:
        """Tokens [first, first + n) of each sequence."""
        spans = [Span(row * n, n, first, table) for row, table in enumerate(tables)]
        each = range(first, first + n)
        positions = torch.tensor(list(each) * batch)
        slots = torch.tensor(
            [table[at // BLOCK] * BLOCK + at % BLOCK for table in tables for at in range(first, first + n)]
        )
        tokens = (torch.arange(batch * n) + first) * 7919 % decoder.spec.vocab_size
        return StepInputs(tokens, positions, slots, AttentionBatch(spans, BLOCK, decoder.windows, decoder.device))

    decoder.forward(step_of(0, CONTEXT), pools)

    def run() -> float:
        times = []
        for _ in range(5):
            step = step_of(CONTEXT, 1)
            started = time.perf_counter()
            decoder.logits(decoder.forward(step, pools))
            times.append(time.perf_counter() - started)
        return median(times)

    return run


def prompt_case(decoder: Decoder, prompt: Tensor) -> Callable[[], float]:
    def run() -> float:
        started = time.perf_counter()
        decoder.logits(last_states(decoder, prompt)[-1:])
        return time.perf_counter() - started

    return run


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=("quality", "speed"))
    parser.add_argument("--documents", type=int, default=3)
    parser.add_argument("--tokens", type=int, default=1024)
    parser.add_argument("--rounds", type=int, default=9)
    args = parser.parse_args()
    only = args.only or ("quality", "speed")
    result: dict[str, Any] = {"threads": torch.get_num_threads()}
    models = {way: load_model(activations=activations) for way, activations in WAYS.items()}
    if "speed" in only:
        result["speed"] = speed(models, args.rounds)
    if "quality" in only:
        result["quality"] = quality(models, args.documents, args.tokens)
    if not args.only:
        save("activations", result)
    print(json.dumps(result))


if __name__ == "__main__":
    main()
