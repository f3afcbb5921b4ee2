"""Where a decode step goes, and what real shapes take, as docs/performance.md shows them."""

from typing import Any

# Stages of model/compiled/job.py in words, in the order of a block.
STAGES = {
    "MLP_INPUT": "gate and up products",
    "MLP_OUTPUT": "down products",
    "QKV": "query, key and value products",
    "ATTN_OUTPUT": "output products of attention",
    "ATTEND": "attention",
    "HEADS": "rotary embedding, keys and values to the cache",
    "ACTIVATION": "activation function",
    "ATTN_NORM": "norms before attention",
    "MLP_NORM": "norms before the MLP",
    "between stages": "between stages",
    "beside the blocks": "beside the blocks: embedding, unembedding, sampling, the engine",
}
GIB, MIB = 1 << 30, 1 << 20


def step(result: dict[str, Any]) -> list[str]:
    batches = result["batches"]
    lines = [
        "| ms of a decode step of SmolLM2-135M | " + " | ".join(f"{batch} requests" for batch in batches) + " |",
        "|---|" + "---:|" * len(batches),
    ]
    for name, words in STAGES.items():
        cells = " | ".join(f"{own['milliseconds'].get(name, 0):.2f}" for own in batches.values())
        lines.append(f"| {words} | {cells} |")
    return [
        *lines,
        "| **a step** | " + " | ".join(f"**{own['step']:.2f}**" for own in batches.values()) + " |",
        "",
        f"`python benchmarks/step.py` on {result['date']} at commit `{result['commit']}`: {result['machine']}, "
        f"{result['threads']} threads, prompts of {result['context']} tokens;",
        "each stage by the processor's clock when its first chunk begins and its last one ends, in steps that nothing",
        "else is measured in; means over the half of the steps that took least.",
    ]


def shapes(result: dict[str, Any]) -> list[str]:
    lines = [
        "| model | file | resident | over 1.3 x file + 300 MiB | start to ready | tokens/s | llama.cpp | ratio |",
        "|---|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for name, own in result["shapes"].items():
        rates = own["median_tokens_per_second"]
        peer = f"{rates['llama_cpp']:.1f} | {own['vs_llama_cpp']:.2f}" if "llama_cpp" in rates else " | "
        lines.append(
            f"| {name} | {own['file_bytes'] / MIB:,.0f} MiB | {own['ready_bytes'] / MIB:,.0f} MiB | "
            f"{own['over_allowed']:.2f} | {own['ready_seconds']:.1f} s | {rates['patchclamp']:.1f} | {peer} |"
        )
    return [
        *lines,
        "",
        f"`python benchmarks/shapes.py` on {result['date']} at commit `{result['commit']}`: {result['machine']}, "
        f"{result['threads']} threads, medians of {result['rounds']} alternating rounds;",
        "random weights in the shape of the model and the formats of Q4_K_M, but for the embedded one. Resident memory",
        "is of the whole server and has the mapped file in it; llama.cpp rounds activations to 8 bits.",
    ]


WAYS = {
    "exact": "ours, exact",
    "int8": "ours, int8",
    "ggml": "ggml",
    "int4": "torch int4, bfloat16",
    "onednn": "oneDNN, packed float32",
    "float32": "`F.linear`, float32",
}


def products(result: dict[str, Any]) -> list[str]:
    lines = [
        "| ms of a product: format, outputs x inputs | rows of x | " + " | ".join(WAYS.values()) + " |",
        "|---|" + "---:|" * (len(WAYS) + 1),
    ]
    name = ""
    for row in result["rows"]:
        before, name = name, f"{row['format']}, {row['out']:,} x {row['in']:,}"
        cells = (f"{row['least_ms'][way]:.2f}" if way in row["least_ms"] else "" for way in WAYS)
        lines.append(f"| {name if name != before else ''} | {row['rows']} | " + " | ".join(cells) + " |")
    return [
        *lines,
        "",
        f"`python benchmarks/products.py --ggml DIRECTORY` on {result['date']} at commit `{result['commit']}`: "
        f"{result['machine']}, {result['threads']} threads;",
        "random weights, least times of alternating runs. ggml is what a wheel of llama.cpp brings: it rounds",
        "activations to 8 bits, and rearranges no weights here. int4 is `torch._weight_int4pack_mm_for_cpu`, which has",
        "a layout of its own and rounds activations and results to bfloat16; torchao's int4 calls it on a CPU.",
    ]


def threads(result: dict[str, Any]) -> list[str]:
    lines = [
        "| SmolLM2-135M, tokens/s | one request | 16 requests | one beside a busy neighbour | the neighbour keeps |",
        "|---|---:|---:|---:|---:|",
    ]
    for way, own in result["ways"].items():
        rates = (own[f"tokens_per_second_{key}"] for key in (1, 16, "beside"))
        cells = " | ".join(f"{rate:.1f}" for rate in rates)
        lines.append(f"| {way} | {cells} | {100 * own['neighbour_keeps']:.0f} % |")
    return [
        *lines,
        "",
        f"`python benchmarks/threads.py` on {result['date']} at commit `{result['commit']}`: {result['machine']};",
        f"medians of {result['rounds']} alternating rounds in one run. The neighbour counts on one core; beside three",
        f"servers that have nothing to do it keeps {100 * result['neighbour_idle']:.0f} % of what it counts alone.",
    ]


def prefill(result: dict[str, Any]) -> list[str]:
    lengths = [name for name in next(iter(result["rows"].values())) if name.startswith("prefill_")]
    alone = " | ".join(f"a prompt of {int(name.removeprefix('prefill_')):,}, tokens/s" for name in lengths)
    lines = [
        f"| `--max-tokens-per-step` | {alone} | beside a stream | its gaps: median ms | p99 | longest |",
        "|---:|" + "---:|" * (len(lengths) + 4),
    ]
    for rows, own in result["rows"].items():
        rates = [own[name] for name in lengths] + [own["prompt_tokens_per_second"]]
        gaps = " | ".join(f"{own[name]:.0f}" for name in ("median_ms", "p99_ms", "longest_ms"))
        lines.append(f"| {rows} | " + " | ".join(f"{rate:,.0f}" for rate in rates) + f" | {gaps} |")
    return [
        *lines,
        "",
        f"`python benchmarks/prefill.py` on {result['date']} at commit `{result['commit']}`: {result['machine']};",
        f"medians of {result['rounds']} alternating rounds in one run. One stream decodes while prompts of",
        f"{result['beside']:,} tokens come one after the other. Beside streams prompts have the rows of a quarter of a",
        "second, and 32 at least.",
    ]
