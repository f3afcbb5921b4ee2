"""Decode speed on this machine's CPU, ours against plain transformers and steered against unsteered, in one run.

    python benchmarks/cpu.py [--rounds 7] [--tokens 64]

1. batch 1: `generate` of transformers (float32, KV cache, greedy) and our engine, same prompt, same number of tokens;
2. 16 requests at once: unsteered, and with 16 different programs (every kind of edit among them).

Prints medians of alternating runs, writes benchmarks/results/cpu.json, and as its last line a JSON object.
"""

from patchclamp_server.threads import configure_threads

configure_threads()

import argparse
import json
import time

import torch
from measure import alternate, rates, run_requests, save
from transformers import AutoModelForCausalLM

from patchclamp_server.engine.engine import Engine
from patchclamp_server.interventions.bind import bind
from patchclamp_server.interventions.bound import BoundProgram
from patchclamp_server.interventions.program import (
    AddVector,
    CapProjection,
    Comparison,
    Condition,
    Edit,
    EditKind,
    Gate,
    HeadEdit,
    NeuronEdit,
    NeuronOp,
    Phase,
    Program,
    ProjectOut,
    RotateTowards,
    Scope,
    TokenSelector,
    Vector,
)
from patchclamp_server.model.embedded import embedded_directory
from patchclamp_server.model.info import ModelInfo
from patchclamp_server.model.load import load_model
from patchclamp_server.model.progress import RichProgress
from patchclamp_server.model.sites import Site

STREAMS = 16
TEXT = "The old lighthouse keeper opened the door and saw"


def programs(info: ModelInfo) -> list[BoundProgram]:
    """16 programs, no two alike: eight kinds of edit at layers of their own, half on generated tokens only."""
    bound = []
    for i in range(STREAMS):
        generator = torch.Generator().manual_seed(i)
        vector = Vector(values=torch.randn(info.d_model, generator=generator))
        condition = Condition(Site.RESID_PRE, 2, vector, Comparison.ABOVE, 0.0)
        neurons = tuple(torch.randperm(info.d_ff, generator=generator)[:8].tolist())
        kinds: list[tuple[EditKind, Site, Gate | None]] = [
            (AddVector(vector), Site.RESID_POST, None),
            (ProjectOut(vector), Site.RESID_PRE, None),
            (CapProjection(vector, max=1.0), Site.RESID_POST, None),
            (RotateTowards(vector, 0.1), Site.RESID_MID, None),
            (NeuronEdit(neurons, op=NeuronOp.SET, values=(0.5,)), Site.MLP_POST, None),
            (NeuronEdit(neurons, op=NeuronOp.CLAMP, min=-0.5, max=0.5), Site.MLP_POST, None),
            (HeadEdit((i % info.n_heads,), scale=0.5), Site.ATTN_Z, None),
            (AddVector(vector), Site.RESID_POST, Gate(condition)),
        ]
        kind, site, gate = kinds[i % len(kinds)]
        first = 8 + i // len(kinds)
        scope = Scope((TokenSelector(phase=Phase.GENERATED),)) if i % 2 else Scope()
        edit = Edit(kind, site, layers=(first, first + 4), strength=0.2, scope=scope, gate=gate)
        bound.append(bind(Program(edits=(edit,)), info))
    return bound


def main() -> None:
    parser = argparse.ArgumentParser(description="Decode speed on the CPU.")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--tokens", type=int, default=64)
    arguments = parser.parse_args()
    with RichProgress() as progress:
        directory = embedded_directory(progress)
        model = load_model(progress=progress)
    plain = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
    plain.generation_config.eos_token_id = None
    prompt = model.tokenizer(TEXT).input_ids
    # Different first words, so that no two requests share a prefix.
    prompts = [model.tokenizer(f"{i} {TEXT}").input_ids for i in range(STREAMS)]
    engine = Engine(model)
    engine.start()
    steered = programs(model.info)
    threads = torch.get_num_threads()

    def transformers() -> float:
        started = time.perf_counter()
        plain.generate(torch.tensor([prompt]), max_new_tokens=arguments.tokens, do_sample=False)
        return time.perf_counter() - started

    figures = alternate(
        {
            "transformers_batch1": transformers,
            "patchclamp_batch1": lambda: run_requests(engine, [prompt], [None], arguments.tokens),
            "patchclamp_16_unsteered": lambda: run_requests(engine, prompts, [None] * STREAMS, arguments.tokens),
            "patchclamp_16_programs": lambda: run_requests(engine, prompts, steered, arguments.tokens),
        },
        arguments.rounds,
    )
    engine.shutdown()
    n = arguments.tokens
    speed = rates(figures, {name: n * (STREAMS if "_16_" in name else 1) for name in figures})
    result = {
        "batch1_vs_transformers": round(speed["patchclamp_batch1"] / speed["transformers_batch1"], 3),
        "programs16_vs_unsteered": round(speed["patchclamp_16_programs"] / speed["patchclamp_16_unsteered"], 3),
        "tokens_per_second": {name: round(value, 1) for name, value in speed.items()},
        "rounds": arguments.rounds,
        "tokens": n,
        "threads": threads,
    }
    for name, value in speed.items():
        print(f"{name:26s} {value:8.1f} tokens/s   runs: " + " ".join(f"{s:.2f}" for s in figures[name]) + " s")
    print(f"written: {save('cpu', result).name}")
    print(json.dumps(result))


if __name__ == "__main__":
    main()
