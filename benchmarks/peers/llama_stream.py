"""Decodes one stream with llama.cpp each time a line comes in.

Run by the Python of an environment of its own, which has `llama-cpp-python` and nothing of ours:

    python benchmarks/peers/llama_stream.py MODEL.gguf THREADS TOKENS PROMPT

Prints "ready VERSION", and then for every line on standard input the seconds from the prompt to the last token: greedy,
TOKENS tokens, whatever ends a text. The C functions are called as llama.cpp's own programs call them; the class of the
binding copies all logits of every token to Python.
"""

import sys
import time

import llama_cpp as c


def main() -> None:
    path, threads, tokens, prompt = sys.argv[1].encode(), int(sys.argv[2]), int(sys.argv[3]), sys.argv[4].encode()
    c.llama_backend_init()
    model = c.llama_model_load_from_file(path, c.llama_model_default_params())
    options = c.llama_context_default_params()
    options.n_ctx, options.n_threads, options.n_threads_batch = 1024, threads, threads
    context = c.llama_init_from_model(model, options)
    vocabulary = c.llama_model_get_vocab(model)
    buffer = (c.llama_token * 512)()
    n = c.llama_tokenize(vocabulary, prompt, len(prompt), buffer, 512, True, True)
    greedy = c.llama_sampler_init_greedy()
    one = (c.llama_token * 1)()
    print("ready", c.__version__, flush=True)
    for _ in sys.stdin:
        c.llama_memory_clear(c.llama_get_memory(context), True)
        started = time.perf_counter()
        c.llama_decode(context, c.llama_batch_get_one(buffer, n))
        for _ in range(tokens - 1):
            one[0] = c.llama_sampler_sample(greedy, context, -1)
            c.llama_decode(context, c.llama_batch_get_one(one, 1))
        c.llama_sampler_sample(greedy, context, -1)
        print(time.perf_counter() - started, flush=True)


if __name__ == "__main__":
    main()
