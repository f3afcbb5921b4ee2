"""Decodes one stream with llama.cpp each time a line comes in.

Run by the Python of an environment of its own, which has `llama-cpp-python` and nothing of ours:

    python benchmarks/peers/llama_stream.py MODEL.gguf THREADS TOKENS PROMPT

Prints "ready VERSION", and then for every line on standard input the seconds from the prompt to the last token: greedy,
TOKENS tokens, end-of-text not sampled for.
"""

import sys
import time

import llama_cpp


def main() -> None:
    path, threads, tokens, prompt = sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), sys.argv[4]
    model = llama_cpp.Llama(path, n_ctx=1024, n_threads=threads, n_threads_batch=threads, verbose=False)
    ids = model.tokenize(prompt.encode())
    print("ready", llama_cpp.__version__, flush=True)
    for _ in sys.stdin:
        model.reset()
        started = time.perf_counter()
        for n, _ in enumerate(model.generate(ids, temp=0.0, repeat_penalty=1.0, reset=True), start=1):
            if n == tokens:
                break
        print(time.perf_counter() - started, flush=True)


if __name__ == "__main__":
    main()
