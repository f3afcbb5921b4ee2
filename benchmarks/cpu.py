"""Decode speed on this machine's CPU, ours against plain transformers and steered against unsteered, in one run.

    python benchmarks/cpu.py [--rounds 7] [--tokens 64] [--llama-cpp PYTHON]

1. batch 1, same prompt, same number of tokens: `generate` of transformers (float32, KV cache, greedy), our engine with
   the same float32 weights, our engine with the 4-bit codes that the weights of the embedded model are made of, and
   llama.cpp with the same file, where PYTHON is the interpreter of an environment that has `llama-cpp-python`;
2. 16 requests at once, on the codes: unsteered, and with 16 different programs (every kind of edit among them).

Prints medians of alternating runs, writes benchmarks/results/cpu.json, and as its last line a JSON object.
"""

from patchclamp_server.threads import configure_threads

configure_threads()

import argparse
import json
import os
import subprocess
import time
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path

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
from patchclamp_server.model.embedded import embedded_file
from patchclamp_server.model.gguf.conversion import converted_gguf
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


def llama_cpp(stack: ExitStack, python: str, threads: int, tokens: int) -> tuple[str, Callable[[], float]]:
    """Version of the peer, and a run of it on the file that the embedded model is made of."""
    model = embedded_file()
    script = Path(__file__).parent / "peers" / "llama_stream.py"
    peer = stack.enter_context(
        subprocess.Popen(
            [python, str(script), str(model), str(threads), str(tokens), TEXT],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            # Its threads wait as llama.cpp has them wait: ours are told not to spin.
            env={name: value for name, value in os.environ.items() if not name.startswith(("OMP_", "GOMP_", "KMP_"))},
        )
    )
    assert peer.stdin is not None
    assert peer.stdout is not None
    given, told = peer.stdin, peer.stdout
    # Before the process is waited for: it ends with its input.
    stack.callback(given.close)
    word, _, version = told.readline().strip().partition(" ")
    if word != "ready":
        raise SystemExit("llama.cpp did not start")

    def run() -> float:
        given.write("\n")
        given.flush()
        return float(told.readline())

    return version, run


def main() -> None:
    parser = argparse.ArgumentParser(description="Decode speed on the CPU.")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--llama-cpp", metavar="PYTHON", help="interpreter that has llama-cpp-python")
    arguments = parser.parse_args()
    with ExitStack() as stack:
        measure(stack, arguments)


def measure(stack: ExitStack, arguments: argparse.Namespace) -> None:
    n: int = arguments.tokens
    with RichProgress() as progress:
        directory = converted_gguf(embedded_file(progress), progress)
        model = load_model(progress=progress)
        uncoded = load_model(progress=progress, use_codes=False)
    plain = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
    plain.generation_config.eos_token_id = None
    prompt = model.tokenizer(TEXT).input_ids
    # Different first words, so that no two requests share a prefix.
    prompts = [model.tokenizer(f"{i} {TEXT}").input_ids for i in range(STREAMS)]
    engine, float32 = Engine(model), Engine(uncoded)
    for each in (engine, float32):
        each.start()
        stack.callback(each.shutdown)
    steered = programs(model.info)
    threads = torch.get_num_threads()

    def transformers() -> float:
        started = time.perf_counter()
        plain.generate(torch.tensor([prompt]), max_new_tokens=n, do_sample=False)
        return time.perf_counter() - started

    runs = {
        "transformers_batch1": transformers,
        "float32_batch1": lambda: run_requests(float32, [prompt], [None], n),
        "patchclamp_batch1": lambda: run_requests(engine, [prompt], [None], n),
        "patchclamp_16_unsteered": lambda: run_requests(engine, prompts, [None] * STREAMS, n),
        "patchclamp_16_programs": lambda: run_requests(engine, prompts, steered, n),
    }
    peer = {}
    if arguments.llama_cpp:
        peer["llama_cpp"], runs["llama_cpp_batch1"] = llama_cpp(stack, arguments.llama_cpp, threads, n)
    figures = alternate(runs, arguments.rounds)
    speed = rates(figures, {name: n * (STREAMS if "_16_" in name else 1) for name in figures})
    result = {
        "float32_vs_transformers": round(speed["float32_batch1"] / speed["transformers_batch1"], 3),
        "batch1_vs_transformers": round(speed["patchclamp_batch1"] / speed["transformers_batch1"], 3),
        "programs16_vs_unsteered": round(speed["patchclamp_16_programs"] / speed["patchclamp_16_unsteered"], 3),
        "tokens_per_second": {name: round(value, 1) for name, value in speed.items()},
        "rounds": arguments.rounds,
        "tokens": n,
        "threads": threads,
    }
    if peer:
        result["batch1_vs_llama_cpp"] = round(speed["patchclamp_batch1"] / speed["llama_cpp_batch1"], 3)
        result["peers"] = peer
    for name, value in speed.items():
        print(f"{name:26s} {value:8.1f} tokens/s   runs: " + " ".join(f"{s:.2f}" for s in figures[name]) + " s")
    print(f"written: {save('cpu', result).name}")
    print(json.dumps(result))


if __name__ == "__main__":
    main()
