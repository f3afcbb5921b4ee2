"""Keys and values in float32, bfloat16 and int8 on the embedded model: what they cost in quality, memory and time.

    python benchmarks/kv.py [--only quality|speed] [--documents 3] [--tokens 2048] [--rounds 5]

- quality: documents of the Brown corpus that no calibration sees, each read as one prompt: perplexity over that of
  float32, mean KL(float32 ‖ other) in nats, and the share of tokens with the same first choice.
- speed: steps of the decoder in alternating rounds: one token of 1 and of 16 sequences behind so many tokens, and a
  prompt in steps of 512. Keys and values of what stands before a decoded token are random, each sequence has its own.

Writes benchmarks/results/kv.json; the last line is a JSON object.
"""

from patchclamp_server.cpu.compiled_code import keep_compiled_code
from patchclamp_server.threads import configure_threads

configure_threads()
keep_compiled_code()

import argparse
import gc
import json
import math
import time
from collections.abc import Callable, Sequence
from statistics import median
from typing import Any

import torch
from brown import DESCRIPTION, evaluation_texts
from measure import alternate, save
from torch import Tensor

from patchclamp_server.analysis.documents import BLOCK, inputs_of
from patchclamp_server.model.attention.batch import AttentionBatch
from patchclamp_server.model.attention.pools import Pool, TiledPool, token_bytes
from patchclamp_server.model.attention.row_attention import write
from patchclamp_server.model.attention.spans import Span
from patchclamp_server.model.decoder import Decoder, StepInputs
from patchclamp_server.model.load import LoadedModel, load_model
from patchclamp_server.model.progress import RichProgress

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "int8": torch.int8}
# Sequences, and the tokens that stand before the one that is decoded.
DECODE = {1: (16, 512, 2048, 8000), 16: (16, 512, 2048)}
PREFILL = 2048
STEP = 512
# Rows of logits that are compared at once.
COMPARED = 256


def pools_of(decoder: Decoder, n_blocks: int, dtype: torch.dtype) -> list[Pool]:
    spec = decoder.spec
    return [TiledPool(n_blocks, BLOCK, spec.n_kv_heads, spec.head_dim, dtype) for _ in range(spec.n_layers)]


def quality(model: LoadedModel, documents: int, tokens: int) -> dict[str, Any]:
    decoder = model.decoder
    texts = [ids for ids in (model.tokenizer(text).input_ids for text in evaluation_texts()) if len(ids) >= tokens]
    if len(texts) < documents:
        raise SystemExit(f"{len(texts)} documents have {tokens} tokens, not {documents}")
    sums = {name: {"loss": 0.0, "divergence": 0.0, "same": 0} for name in DTYPES}
    for ids in texts[:documents]:
        document = torch.tensor([ids[:tokens]])
        states = {name: last_states(decoder, document, dtype) for name, dtype in DTYPES.items()}
        for start in range(0, tokens - 1, COMPARED):
            rows = slice(start, min(start + COMPARED, tokens - 1))
            targets = document[0, 1:][rows]
            reference = decoder.logits(states["float32"][rows]).double().log_softmax(1)
            for name, own in sums.items():
                log_p = decoder.logits(states[name][rows]).double().log_softmax(1)
                own["loss"] -= float(log_p.gather(1, targets[:, None]).sum())
                own["divergence"] += float((reference.exp() * (reference - log_p)).sum())
                own["same"] += int((reference.argmax(1) == log_p.argmax(1)).sum())
    n = documents * (tokens - 1)
    exact = math.exp(sums["float32"]["loss"] / n)
    cards = {
        name: {
            "perplexity_ratio": round(math.exp(own["loss"] / n) / exact, 6),
            "divergence": own["divergence"] / n,
            "same_first_choice": round(own["same"] / n, 6),
        }
        for name, own in sums.items()
    }
    return {"documents": documents, "tokens": n, "text": DESCRIPTION, "perplexity": round(exact, 3), "cards": cards}


def last_states(decoder: Decoder, document: Tensor, dtype: torch.dtype) -> Tensor:
    """The residual stream [T, d_model] at the end, of a prompt in steps."""
    tokens = document.shape[1]
    pools = pools_of(decoder, tokens // BLOCK + 2, dtype)
    steps = [inputs_of(document, at, min(at + STEP, tokens), decoder) for at in range(0, tokens, STEP)]
    return torch.cat([decoder.forward(step, pools) for step in steps])


def speed(model: LoadedModel, rounds: int) -> dict[str, Any]:
    decoder = model.decoder
    rows: list[dict[str, Any]] = []
    for batch, contexts in DECODE.items():
        for context in contexts:
            cases = {name: decode_case(decoder, batch, context, dtype) for name, dtype in DTYPES.items()}
            times = alternate(cases, rounds)
            for name, own in times.items():
                read = batch * context * bytes_of(decoder, DTYPES[name])
                rows.append({"case": "decode", "batch": batch, "context": context, "kv": name, "bytes": read} | of(own))
            gc.collect()
    document = torch.arange(PREFILL)[None] * 7919 % model.decoder.spec.vocab_size
    times = alternate({name: prefill_case(decoder, document, dtype) for name, dtype in DTYPES.items()}, rounds)
    rows += [{"case": "prefill", "batch": 1, "context": PREFILL, "kv": name} | of(own) for name, own in times.items()]
    return {"rounds": rounds, "rows": rows}


def of(seconds: Sequence[float]) -> dict[str, float]:
    return {"ms": round(1e3 * median(seconds), 3), "least_ms": round(1e3 * min(seconds), 3)}


def decode_case(decoder: Decoder, batch: int, context: int, dtype: torch.dtype) -> Callable[[], float]:
    """A step of one token each, and its logits."""
    blocks = context // BLOCK + 1
    pools = pools_of(decoder, batch * blocks + 1, dtype)
    spec = decoder.spec
    generator = torch.Generator().manual_seed(0)
    for start in range(BLOCK, batch * blocks * BLOCK + BLOCK, 1 << 14):
        slots = torch.arange(start, min(start + (1 << 14), batch * blocks * BLOCK + BLOCK))
        k, v = torch.randn(2, len(slots), spec.n_kv_heads, spec.head_dim, generator=generator)
        for pool in pools:
            assert isinstance(pool, TiledPool)
            write(k, v, slots, pool)
    # Blocks of a sequence lie apart, as after a while of serving.
    order = (torch.randperm(batch * blocks, generator=generator) + 1).view(batch, blocks).tolist()
    spans = [Span(row, 1, context, own) for row, own in enumerate(order)]
    positions = torch.full((batch,), context)
    slots = torch.tensor([own[context // BLOCK] * BLOCK + context % BLOCK for own in order])
    tokens = torch.arange(batch) * 7919 % spec.vocab_size

    def run() -> float:
        step = StepInputs(tokens, positions, slots, AttentionBatch(spans, BLOCK, decoder.windows, decoder.device))
        started = time.perf_counter()
        decoder.logits(decoder.forward(step, pools))
        return time.perf_counter() - started

    return run


def prefill_case(decoder: Decoder, document: Tensor, dtype: torch.dtype) -> Callable[[], float]:
    def run() -> float:
        started = time.perf_counter()
        last_states(decoder, document, dtype)
        return time.perf_counter() - started

    return run


def bytes_of(decoder: Decoder, dtype: torch.dtype) -> int:
    spec = decoder.spec
    return token_bytes(spec.n_layers, spec.n_kv_heads, spec.head_dim, dtype, tiled=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--only", choices=("quality", "speed"))
    parser.add_argument("--documents", type=int, default=3)
    parser.add_argument("--tokens", type=int, default=2048)
    parser.add_argument("--rounds", type=int, default=5)
    args = parser.parse_args()
    with RichProgress() as progress:
        model = load_model(progress=progress)
    result: dict[str, Any] = {
        "token_bytes": {name: bytes_of(model.decoder, dtype) for name, dtype in DTYPES.items()},
        "threads": torch.get_num_threads(),
    }
    if args.only != "speed":
        result["quality"] = quality(model, args.documents, args.tokens)
        for name, card in result["quality"]["cards"].items():
            print(f"{name:10}{card}", flush=True)
    if args.only != "quality":
        result["speed"] = speed(model, args.rounds)
        for row in result["speed"]["rows"]:
            print(row, flush=True)
    if args.only is None:
        save("kv", result)
    print(json.dumps(result))


if __name__ == "__main__":
    main()
