"""Decode speed on this machine's CPU, ours against plain transformers and steered against unsteered, in one run.

    python benchmarks/cpu.py [--rounds 7] [--tokens 64] [--llama-cpp PYTHON]

1. batch 1, same prompt, same number of tokens: `generate` of transformers (float32, KV cache, greedy), our engine with
   the same float32 weights, our engine with the 4-bit codes that the weights of the embedded model are made of, and
   llama.cpp with the same file, where PYTHON is the interpreter of an environment that has `llama-cpp-python`;
2. 16 requests at once, on the codes: unsteered, and with 16 different programs (every kind of edit among them).

Prints medians of alternating runs, writes benchmarks/results/cpu.json, and as its last line a JSON object.
"""

from patchclamp_server.cpu.compiled_code import keep_compiled_code
from patchclamp_server.threads import configure_threads

configure_threads()
keep_compiled_code()

import argparse
import json
import time
from collections.abc import Callable
from contextlib import ExitStack

import torch
from edits import STREAMS, programs
from measure import alternate, rates, run_requests, save
from peers.environments import LLAMA, WORKER_OF
from peers.process import WORKERS, Worker, environment
from transformers import AutoModelForCausalLM

from patchclamp_server.engine.engine import Engine
from patchclamp_server.model.embedded import embedded_file
from patchclamp_server.model.gguf.conversion import converted_gguf
from patchclamp_server.model.load import load_model
from patchclamp_server.model.progress import RichProgress

Run = Callable[[], float]
TEXT = "The old lighthouse keeper opened the door and saw"


def llama_cpp(stack: ExitStack, python: str, threads: int, prompt: list[int], tokens: int) -> tuple[str, Run]:
    """Version of the peer, and a run of it on the file that the embedded model is made of."""
    # Its threads wait as llama.cpp has them wait: ours are told not to spin.
    worker = stack.enter_context(Worker([python, str(WORKERS / WORKER_OF[LLAMA])], environment(threads, None)))
    loaded = worker.ask("load", model=str(embedded_file()), vectors=None, threads=threads)

    def run() -> float:
        answer = worker.ask("decode", prompts=[prompt], tokens=tokens, programs=[None], one_by_one=1)
        return float(answer["prefill_seconds"] + answer["decode_seconds"])

    return loaded["versions"]["llama-cpp-python"], run


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
        peer["llama_cpp"], runs["llama_cpp_batch1"] = llama_cpp(stack, arguments.llama_cpp, threads, prompt, n)
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
