"""What sparse policies make of decoding, end to end: tokens a second of requests together, dense and sparse in turn.

At batch 1, 2, 4 and 8 each round decodes the same requests densely and by every policy at every ratio, and then in the
opposite order. A figure is the median time of a step, between the tokens of the request that came last, and a ratio
that of dense and sparse within a round. Where policies were evaluated, the perplexity ratio stands beside.
"""

from collections.abc import Callable, Mapping, Sequence
from statistics import median
from typing import Any

import torch
from measure import alternate, decode_steps

from patchclamp_server.engine.engine import Engine
from patchclamp_server.engine.request import SparseInference
from patchclamp_server.sparsity.policy import Selector

BATCHES = (1, 2, 4, 8)
PROMPT = 128
DENSE = "dense"
SUMMARY = ("decode_vs_dense", "decode_step_ms")


def measure(
    engine: Engine,
    selectors: Mapping[str, Selector],
    ratios: Mapping[str, float],
    *,
    batches: Sequence[int] = BATCHES,
    prompt: int = PROMPT,
    tokens: int = 48,
    rounds: int = 7,
) -> dict[str, Any]:
    """`selectors` by what they are called, and the perplexity ratios of some of them."""
    generator = torch.Generator().manual_seed(0)
    vocab = engine.model.info.vocab_size
    found: dict[str, dict[str, Any]] = {name: {} for name in (DENSE, *selectors)}
    for batch in batches:
        prompts = torch.randint(min(100, vocab // 2), vocab, (batch, prompt), generator=generator).tolist()

        def run(selector: Selector | None, prompts: list[list[int]] = prompts) -> Callable[[], float]:
            sparsity = None if selector is None else SparseInference("", selector)
            return lambda: median(decode_steps(engine, prompts, None, tokens, sparsity))

        runs = {DENSE: run(None)} | {name: run(selector) for name, selector in selectors.items()}
        figures = alternate(runs, rounds)
        print(f"{batch} requests")
        for name, seconds in figures.items():
            each = sorted(dense / own for dense, own in zip(figures[DENSE], seconds, strict=True))
            own = found[name][str(batch)] = {
                "step_ms": round(1000 * median(seconds), 3),
                "tokens_per_second": round(batch / median(seconds), 1),
                "vs_dense": round(median(each), 3),
                "vs_dense_range": [round(each[0], 3), round(each[-1], 3)],
            }
            quality = f"   perplexity ratio {ratios[name]:.4f}" if name in ratios else ""
            print(
                f"    {name:14}{own['step_ms']:9.2f} ms{own['tokens_per_second']:9.1f} tokens/s"
                f"{own['vs_dense']:8.2f} of dense {own['vs_dense_range']}{quality}",
                flush=True,
            )
    return {
        "decode_vs_dense": {
            name: {batch: own["vs_dense"] for batch, own in by_batch.items()} for name, by_batch in found.items()
        },
        "decode_step_ms": {
            name: {batch: own["step_ms"] for batch, own in by_batch.items()} for name, by_batch in found.items()
        },
        "perplexity_ratios": dict(ratios),
        "decode": found,
        "prompt": prompt,
        "tokens": tokens,
        "rounds": rounds,
        "threads": torch.get_num_threads(),
    }
