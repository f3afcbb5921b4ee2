"""Whether what a request is told depends on what else runs, and what it costs that it does not.

    python benchmarks/invariance.py [--prompts 100] [--tokens 48] [--rounds 5] [--mode on|off]

1. The prompts alone and in batches of 2, 8 and 40, greedy and at temperature 1.5, with log-probabilities, in steps of
   at most 64 rows: how many have another text, or another log-probability in any bit, than alone. `--mode off` counts
   without `--batch-invariant`, for comparison.
2. Speed of the mode over that of the engine without it, in alternating runs: decoding 1 and 16 streams, and prompts.

Writes benchmarks/results/invariance.json (not with --mode off), and prints as its last line a JSON object.
"""

from patchclamp_server.cpu.compiled_code import keep_compiled_code
from patchclamp_server.threads import configure_threads

configure_threads()
keep_compiled_code()

import argparse
import json
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from measure import alternate, rates, run_requests, save

from patchclamp_server.engine.config import EngineConfig
from patchclamp_server.engine.engine import Engine
from patchclamp_server.engine.request import Event, Failed, Request, SamplingParams, StopParams, Token
from patchclamp_server.model.load import LoadedModel, load_model
from patchclamp_server.model.progress import RichProgress

BATCHES = (2, 8, 40)
THREADS = torch.get_num_threads()
STREAMS = 16
PROMPT_TOKENS = 480
SENTENCES = Path(__file__).parent / "data" / "concepts" / "joyful_sad.jsonl"
KINDS = {
    "greedy": SamplingParams(logprobs=2),
    "temperature 1.5": SamplingParams(temperature=1.5, logprobs=2),
}


@dataclass(eq=False)
class Heard:
    """What one request was told: a token, its log-probability and the most likely ones with theirs, each."""

    tokens: list[tuple[int, float | None, tuple[tuple[int, float], ...]]] = field(default_factory=list)
    failures: list[str] = field(default_factory=list)

    def on_event(self, event: Event) -> None:
        if isinstance(event, Token):
            self.tokens.append((event.id, event.logprob, event.top_logprobs))
        elif isinstance(event, Failed):
            self.failures.append(str(event.error))

    @property
    def text(self) -> list[int]:
        return [token for token, *_ in self.tokens]


def main() -> None:
    parser = argparse.ArgumentParser(description="Batch invariance, and its cost.")
    parser.add_argument("--prompts", type=int, default=100)
    parser.add_argument("--tokens", type=int, default=48)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--mode", choices=("on", "off"), default="on")
    arguments = parser.parse_args()
    with RichProgress() as progress:
        model = load_model(batch_invariant=arguments.mode == "on", progress=progress)
    texts = prompts(model, arguments.prompts)
    different = {"texts": 0, "logprobs": 0}
    for kind, sampling in KINDS.items():
        alone = heard(model, texts, 1, sampling, arguments.tokens)
        for size in BATCHES:
            found = compare(alone, heard(model, texts, size, sampling, arguments.tokens))
            print(f"{kind}, batches of {size}: " + ", ".join(f"{n} different {name}" for name, n in found.items()))
            different = {name: n + found[name] for name, n in different.items()}
    result = {
        "prompts": len(texts),
        "tokens": arguments.tokens,
        "batches": list(BATCHES),
        "different_texts": different["texts"],
        "different_logprobs": different["logprobs"],
    }
    if arguments.mode == "on":
        result |= speed(model, load_model(batch_invariant=False), arguments.rounds)
        print(f"written: {save('invariance', result).name}")
    print(json.dumps(result))


def prompts(model: LoadedModel, n: int) -> list[tuple[int, ...]]:
    """One to six sentences each; every fourth begins like the one before it."""
    pairs = [json.loads(line) for line in SENTENCES.read_text().splitlines()]
    sentences = [pair[side] for pair in pairs for side in ("positive", "negative")]
    texts: list[str] = []
    for i in range(n):
        own = " ".join(sentences[(7 * i + j) % len(sentences)] for j in range(1 + i % 6))
        texts.append(f"{texts[-1]} {own}" if i % 4 == 3 else own)
    return [tuple(model.tokenizer(text).input_ids) for text in texts]


def heard(
    model: LoadedModel, texts: Sequence[tuple[int, ...]], size: int, sampling: SamplingParams, tokens: int
) -> list[Heard]:
    """The prompts in batches of `size`, the seed of each its number."""
    engine = Engine(model, EngineConfig(max_tokens_per_step=64))
    every: list[Heard] = []
    for start in range(0, len(texts), size):
        for seed, text in enumerate(texts[start : start + size], start):
            every.append(Heard())
            stop = StopParams(max_tokens=tokens, ignore_eos=True)
            asked = SamplingParams(sampling.temperature, logprobs=sampling.logprobs, seed=seed)
            engine.submit(Request(text, every[-1].on_event, sampling=asked, stop=stop))
        while engine.step():
            pass
    failures = [failure for own in every for failure in own.failures]
    if failures:
        raise RuntimeError(failures[0])
    return every


def compare(alone: Sequence[Heard], together: Sequence[Heard]) -> dict[str, int]:
    pairs = list(zip(alone, together, strict=True))
    return {
        "texts": sum(a.text != b.text for a, b in pairs),
        "logprobs": sum(a.tokens != b.tokens for a, b in pairs),
    }


def speed(on: LoadedModel, off: LoadedModel, rounds: int) -> dict[str, object]:
    """Tokens a second of the engine with and without the mode."""
    # A step of few rows leaves torch with one thread, and an engine takes those that it finds.
    torch.set_num_threads(THREADS)
    engines = {"on": Engine(on, EngineConfig(enable_prefix_cache=False))}
    engines["off"] = Engine(off, EngineConfig(enable_prefix_cache=False))
    short = [on.tokenizer(f"{i} old lighthouse keepers opened the door and saw").input_ids for i in range(STREAMS)]
    generator = torch.Generator().manual_seed(0)
    long = torch.randint(100, on.info.vocab_size, (PROMPT_TOKENS,), generator=generator).tolist()
    work = {
        "decode_1": (short[:1], 48),
        "decode_16": (short, 24),
        "prefill": ([long], 1),
    }
    runs = {
        f"{name} {mode}": lambda engine=engine, asked=asked: run_requests(
            engine, asked[0], [None] * len(asked[0]), asked[1]
        )
        for name, asked in work.items()
        for mode, engine in engines.items()
    }
    for engine in engines.values():
        engine.start()
    started = time.perf_counter()
    figures = alternate(runs, rounds)
    for engine in engines.values():
        engine.shutdown()
    counts = {"decode_1": 48, "decode_16": 24 * STREAMS, "prefill": PROMPT_TOKENS}
    found = rates(figures, {name: counts[name.split()[0]] for name in figures})
    for name, value in found.items():
        print(f"{name:14s} {value:8.1f} tokens/s   runs: " + " ".join(f"{s:.2f}" for s in figures[name]) + " s")
    print(f"speeds measured in {time.perf_counter() - started:.0f} s")
    return {
        "decode_ratio_1": round(found["decode_1 on"] / found["decode_1 off"], 3),
        "decode_ratio_16": round(found["decode_16 on"] / found["decode_16 off"], 3),
        "prefill_ratio": round(found["prefill on"] / found["prefill off"], 3),
        "tokens_per_second": {name: round(value, 1) for name, value in found.items()},
        "rounds": rounds,
        "threads": THREADS,
    }


if __name__ == "__main__":
    main()
