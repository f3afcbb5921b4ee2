"""Writes the numbers of README.md and docs/performance.md from benchmarks/results/*.json.

python benchmarks/readme.py            rewrite the blocks between the two markers
python benchmarks/readme.py --check    exit status 1 when a block is stale

A result whose code has changed since it was measured (measured_code.py) is not shown, but named: pages that still show
it are stale.
"""

import argparse
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))
import cpu_page
from measured_code import ROOT, code_digest
from neurons import page as neurons
from peers import page as peers
from vectors import page as vectors

README = ROOT / "README.md"
PERFORMANCE = ROOT / "docs" / "performance.md"
RESULTS = ROOT / "benchmarks" / "results"
BEGIN = "<!-- numbers: begin (written by benchmarks/readme.py from benchmarks/results) -->"
END = "<!-- numbers: end -->"


def cpu(result: dict[str, Any]) -> list[str]:
    speed, ratios = result["tokens_per_second"], result
    rows = [
        ("one request: `generate` of transformers, float32", "transformers_batch1", "1"),
        ("one request: Patchclamp, float32", "float32_batch1", f"{ratios['float32_vs_transformers']:.2f}"),
        ("one request: Patchclamp, 4-bit codes", "patchclamp_batch1", f"{ratios['batch1_vs_transformers']:.2f}"),
    ]
    if "llama_cpp_batch1" in speed:
        times = speed["llama_cpp_batch1"] / speed["transformers_batch1"]
        version = result["peers"]["llama_cpp"]
        rows.append((f"one request: llama.cpp ({version}), same file", "llama_cpp_batch1", f"{times:.2f}"))
    rows += [
        ("16 requests, 4-bit codes, unsteered", "patchclamp_16_unsteered", "1"),
        ("16 requests, 4-bit codes, 16 programs", "patchclamp_16_programs", f"{ratios['programs16_vs_unsteered']:.2f}"),
    ]
    versions = ", ".join(f"{name} {version}" for name, version in result["versions"].items())
    return [
        "| SmolLM2-135M, greedy decoding on a CPU | tokens/s | ratio |",
        "|---|---:|---:|",
        *(f"| {name} | {speed[key]:.1f} | {ratio} |" for name, key, ratio in rows),
        "",
        f"`{COMMANDS['cpu']}` on {result['date']} at commit `{result['commit']}`: {result['machine']}, "
        f"{result['threads']} threads, {versions};",
        f"{result['tokens']} tokens a request, medians of {result['rounds']} alternating rounds in one run.",
        "Activations are float32 in all rows but that of llama.cpp, which rounds them to 8 bits.",
    ]


SPARSE_CASES = {
    "8b_float32": "8B shape, float32",
    "8b_bfloat16": "8B shape, bfloat16",
    "embedded_codes": "SmolLM2-135M, 4-bit codes",
}
SPARSE_SETS = {
    "fixed": "set fixed for the sequence",
    "token": "set of each token, known before",
    "gate": "set known after the gate (cats)",
    "fovea": "fovea, all it does",
}
SPARSE_KEEPS = ("0.5", "0.3")


def sparse_speed(result: dict[str, Any]) -> list[str]:
    """Against the fastest dense product of the run, ours or torch's."""
    lines = [
        "| MLP on a CPU, batch 1, active neurons of all | "
        + " | ".join(f"{float(keep):.0%}: speed-up | bound by bytes | of the bound" for keep in SPARSE_KEEPS)
        + " |",
        "|---|" + "---:|---:|---:|" * len(SPARSE_KEEPS),
    ]
    for case, model in SPARSE_CASES.items():
        for kind, sets in SPARSE_SETS.items():
            cells = []
            for keep in SPARSE_KEEPS:
                row = result["cases"][case]["sparse"][f"{kind} {keep}"]
                cells += [f"{row['vs_fastest']:.2f}", f"{row['byte_bound']:.2f}", f"{100 * row['of_byte_bound']:.0f} %"]
            lines.append(f"| {model}; {sets} | " + " | ".join(cells) + " |")
    return [
        *lines,
        "",
        f"`python benchmarks/sparse --only speed` on {result['date']} at commit `{result['commit']}`: "
        f"{result['machine']}, {result['threads']} threads,",
        f"medians of {result['rounds']} alternating rounds, against the faster of `F.linear` and our dense product.",
    ]


def sparse_decode(result: dict[str, Any]) -> list[str]:
    """Steps against dense ones of the same rounds."""
    batches = list(next(iter(result["decode"].values())))
    lines = [
        "| decoding, SmolLM2-135M; of the dense rate | perplexity over dense | "
        + " | ".join(f"{batch} requests" if batch != "1" else "1 request" for batch in batches)
        + " |",
        "|---|---:|" + "---:|" * len(batches),
    ]
    for name, own in result["decode"].items():
        if name == "dense":
            cells = [f"{own[batch]['step_ms']:.2f} ms a step" for batch in batches]
        else:
            cells = ["{:.2f} ({:.2f} to {:.2f})".format(own[b]["vs_dense"], *own[b]["vs_dense_range"]) for b in batches]
        ratio = result["perplexity_ratios"].get(name, 1.0)
        lines.append(f"| {name} | {_ratio(ratio)} | {' | '.join(cells)} |")
    return [
        *lines,
        "",
        f"`{COMMANDS['sparse_decode']}` on {result['date']} at commit `{result['commit']}`: {result['machine']}, "
        f"{result['threads']} threads, medians (least to most) of {result['rounds']} alternating rounds of "
        f"{result['tokens']} tokens after {result['prompt']};",
        f"perplexity on {result['scored_tokens']} tokens, text {result['text']}.",
    ]


# Rows of benchmarks/sparse/quality.py whose name does not say what they are.
SPARSE_ROWS = {
    "fovea": "**fovea**, ours",
    "fovea_select": "fovea without its stand-in",
    "teal_uniform": "teal, uniform",
    "teal_greedy": "teal, greedy",
    "random": "control: random set",
    "oracle": "control: the set that turns out best",
}
CONTROLS = ("random", "oracle")
KEEP_ALL = ("dense", "exact_zero")


def sparse_quality(result: dict[str, Any]) -> list[str]:
    """Best rows first, controls last; what keeps everything is in words."""
    table = result["table"]
    rows = [row for row in table if "0.5" in table[row]]
    rows.sort(key=lambda row: (row in CONTROLS, table[row]["0.5"]["perplexity_ratio"]))
    keeps = sorted(table[rows[0]], key=float, reverse=True)
    lines = [
        "| SmolLM2-135M; perplexity over dense, at active neurons of all | "
        + " | ".join(f"{float(keep):.0%}" for keep in keeps)
        + " | 50%: KL | top-1 | not computed | bytes |",
        "|---|" + "---:|" * (len(keeps) + 4),
    ]
    for row in rows:
        cards = table[row]
        ratios = " | ".join(_ratio(cards[keep]["perplexity_ratio"]) for keep in keeps)
        half = cards["0.5"]
        lines.append(
            f"| {SPARSE_ROWS.get(row, row.replace('_', ' '))} | {ratios} | {half['divergence']:.3f} | "
            f"{half['top1_agreement']:.3f} | {half['sparsity']:.3f} | {half['bytes_read_16']:.2f} |"
        )
    exact = ", ".join(f"{name.replace('_', ' ')} {table[name]['1']['perplexity_ratio']:.4f}" for name in KEEP_ALL)
    served = [row for row in rows if row not in CONTROLS]
    best = [keep for keep in keeps if min(served, key=lambda row: table[row][keep]["perplexity_ratio"]) == "fovea"]
    return [
        "![Perplexity over dense against the bytes of weights read by a token, by policy](images/sparse_quality.svg)",
        "",
        *lines,
        "",
        f"`python benchmarks/sparse --only quality` on {result['date']} at commit `{result['commit']}`: "
        f"{result['documents']} documents that calibration did not see,",
        f"{result['scored_tokens']} scored tokens, text {result['text']}, dense perplexity "
        f"{result['dense_perplexity']:.2f} ({exact}).",
        "KL(dense ‖ sparse) in nats, agreement of the first choice, and the bytes of the MLP that a token reads where "
        "weights have 16 bits",
        "(teal, wina: of all four products). Of the policies that can be served ours is best at "
        f"{', '.join(f'{float(keep):.0%}' for keep in best) or 'none of these ratios'}.",
    ]


def _ratio(value: float) -> str:
    return f"{value:.3f}" if value < 10 else f"{value:.1f}" if value < 100 else f"{value:.0f}"


# What the goals of benchmarks/gpu are about, and whether less is better.
GOALS = {
    "attention_decode_vs_bound": ("attention at decode, of its bandwidth bound", False),
    "attention_readout_overhead": ("read-out of the attention, cost", True),
    "all_layer_steering_256": ("256 rows steered at all layers, of unsteered", False),
    "distinct_programs_256": ("256 programs, of one program", False),
    "neuron_clamps_overhead": ("64 neurons clamped at every layer of 256 rows, cost", True),
    "sparse_mlp_vs_bound_keep50": ("sparse MLP with half of the neurons, of its byte bound", False),
    "batch1_decode_vs_bound": ("decode at batch 1, of its bandwidth bound", False),
}


def gpu(result: dict[str, Any]) -> list[str]:
    """Raises SystemExit for a run that is not whole: its worst values are not the worst."""
    environment = result["environment"]
    if not result["complete"] or result["errors"] or environment["device"] == "cpu":
        raise SystemExit(f"the result of {environment['device']} is no whole run of benchmarks/gpu")
    lines = [
        f"| {environment['device']}, bfloat16, random weights | worst measured | goal |",
        "|---|---:|---:|",
    ]
    for name, row in result["summary"].items():
        title, less = GOALS[name]
        value = "not measured" if row["value"] is None else f"{100 * row['value']:.1f} %"
        lines.append(f"| {title} | {value} | {'≤' if less else '≥'} {100 * row['goal']:.0f} % |")
    models = list(dict.fromkeys(row["model"] for row in result.get("engine", [])))
    rows = result.get("engine", []) + result.get("baselines", [])
    if models:
        lines += ["", "| tokens/s | " + " | ".join(models) + " |", "|---|" + "---:|" * len(models)]
    for case, batch in dict.fromkeys((row["case"], row["batch"]) for row in rows):
        speed = {row["model"]: row["tokens_per_second"] for row in rows if (row["case"], row["batch"]) == (case, batch)}
        cells = " | ".join(f"{speed[m]:,.0f}" if m in speed else "" for m in models)
        lines.append(f"| batch {batch}, {case} | {cells} |")
    versions = ", ".join(f"{name} {version}" for name, version in environment["versions"].items())
    checks = result.get("checks", [])
    copy, rate = (result["ceilings"][key] for key in ("copy_bytes_per_second", "flops_per_second"))
    return [
        *lines,
        "",
        f"`benchmarks/gpu` on {environment['date']} at commit `{environment['commit']}`: {versions}; "
        f"{sum(row['ok'] for row in checks)} of {len(checks)} comparisons with references passed.",
        f"Bounds are for {copy / 1e12:.2f} TB/s and {rate / 1e12:.0f} TFLOP/s, measured in the same run.",
    ]


def heads_causal(result: dict[str, Any]) -> list[str]:
    """The causal table, and in words how the heads were found."""
    table, found = result["causal"], result["detection"]
    rows = [("nothing", table["unedited"])]
    for k in (3, 10):
        rows += [(f"the {k} best retrieval heads", table[f"top{k}"]), (f"{k} other heads, drawn", table[f"random{k}"])]
    lines = [
        "| SmolLM2-135M; set to zero | needles answered | mean recall | perplexity of ordinary text |",
        "|---|---:|---:|---:|",
    ]
    for name, row in rows:
        answered, times = row["successes"], len(row["successes"])
        spread = f", {min(answered)} to {max(answered)} in {times} draws" if times > 1 else ""
        several = f" ({min(row['perplexities']):.1f} to {max(row['perplexities']):.1f})" if times > 1 else ""
        lines.append(
            f"| {name} | {100 * row['success_rate']:.0f} % of {row['runs']}{spread} | {row['recall']:.2f} | "
            f"{row['perplexity']:.1f}{several} |"
        )
    best = ", ".join(f"{head['head']} {head['score']:.2f}" for head in found["best"][:3])
    return [
        *lines,
        "",
        f"`python benchmarks/heads.py --only causal` on {result['date']} at commit `{result['commit']}`: "
        f"{result['machine']}, {result['threads']} threads.",
        f"Found with other needles: {found['runs']} runs of {min(map(int, found['by_length']))} to "
        f"{max(map(int, found['by_length']))} tokens, {found['successes']} answered; {found['above_threshold']} of "
        f"{found['heads']} heads have a retrieval score of at least 0.1 ({best}).",
    ]


def heads_naive(result: dict[str, Any]) -> list[str]:
    return [
        f"Retrieval heads of {result['runs']} needle runs, against full attention matrices token by token in the same "
        f"run (`python benchmarks/heads.py --only naive`, {result['date']}, commit `{result['commit']}`):",
        f"{result['speedup']:.0f} times as fast, {result['speedup_over_naive_with_cache']:.1f} times as fast as when "
        f"those keep keys and values; rank correlation of all heads {result['rank_correlation']:.3f}.",
    ]


def heads_readout(result: dict[str, Any]) -> list[str]:
    each = ", ".join(f"{100 * row['overhead']:+.1f} % at batch {n}" for n, row in result["batches"].items())
    return [
        f"Reading where all heads look, as a share of decode time (`python benchmarks/heads.py --only readout`, "
        f"{result['date']}, commit `{result['commit']}`): {each}.",
    ]


def load(result: dict[str, Any]) -> list[str]:
    tokens, requests = result["first_token_seconds"], result["refusal_seconds"]
    return [
        f"Overload (`python benchmarks/load`, {result['date']}, commit `{result['commit']}`, {result['machine']}): "
        f"{result['offered']} requests in {result['seconds']:.0f} s,",
        f"{result['offered_requests_per_second']:.1f} a second, at {result['overload']:.0f} times the capacity of "
        f"{result['capacity_tokens_per_second']:.0f} tokens/s. Goodput {100 * result['goodput_ratio']:.0f} % of "
        f"capacity; {100 * result['refused_with_retry_info']:.0f} % of the refused requests",
        f"carried RetryInfo (half were refused within {1e3 * requests['p50']:.0f} ms); streams without an end: "
        f"{result['stuck_streams']}; memory after / before: {result['rss_growth_ratio']:.2f}; first token within",
        f"{tokens['p50']:.1f} s (median) and {tokens['p99']:.1f} s (99 %).",
    ]


def monitoring(result: dict[str, Any]) -> list[str]:
    rows = [
        f"{100 * row[name]:+.1f} % at batch {batch}{' against a reference' if name != 'watched' else ''}"
        for batch, row in result["batches"].items()
        for name in ("watched", "against_reference")
    ]
    return [
        f"Watching {result['neurons']} neurons and {result['directions']} directions, as a share of decode time "
        f"(`python benchmarks/monitoring.py`, {result['date']}, commit `{result['commit']}`):",
        f"{', '.join(rows)}.",
    ]


def faults(result: dict[str, Any]) -> list[str]:
    lines = ["| fault (a real server process) | what its client saw | lost by others |", "|---|---|---|"]
    for row in result["rows"]:
        lost = {what: n for what, n in row["lost"].items() if n}
        lines.append(f"| {row['fault']} | {row['seen']} | {'nothing' if not lost else json.dumps(lost)} |")
    return [
        *lines,
        "",
        f"`python benchmarks/faults` on {result['date']} at commit `{result['commit']}`: tokens of neighbours, "
        "acknowledged artifacts, KV blocks, table rows and calls still held are counted.",
    ]


def invariance(result: dict[str, Any]) -> list[str]:
    decode, prefill = (f"{result[name]:.2f}" for name in ("decode_ratio_1", "prefill_ratio"))
    return [
        f"Batch invariance, on by default in float32 on a CPU (`python benchmarks/invariance.py`, {result['date']}, "
        f"commit `{result['commit']}`): of {result['prompts']} prompts",
        f"alone and in batches of {', '.join(map(str, result['batches']))}, {result['different_texts']} texts and "
        f"{result['different_logprobs']} log-probabilities differ. Speed with it over speed without:",
        f"{decode} decoding one request, {result['decode_ratio_16']:.2f} decoding 16, {prefill} in prompts.",
    ]


def kv(result: dict[str, Any]) -> list[str]:
    measured, quality = result["speed"], result["quality"]
    rows = {(row["case"], row["batch"], row["context"], row["kv"]): row for row in measured["rows"]}
    decoded = sorted({key[1:3] for key in rows if key[0] == "decode"})
    lines = [
        "| SmolLM2-135M; keys and values in | bytes a token | perplexity over float32 | KL, nats | same first choice |",
        "|---|---:|---:|---:|---:|",
        *(
            f"| {name} | {result['token_bytes'][name]:,} | {card['perplexity_ratio']:.4f} | {card['divergence']:.1e} | "
            f"{100 * card['same_first_choice']:.2f} % |"
            for name, card in quality["cards"].items()
        ),
        "",
        "| ms of a step; sequences x tokens before | float32 | bfloat16 | int8 |",
        "|---|---:|---:|---:|",
    ]
    for batch, context in decoded:
        cells = " | ".join(f"{rows['decode', batch, context, name]['ms']:.1f}" for name in quality["cards"])
        lines.append(f"| one token of {batch} x {context:,} | {cells} |")
    prefill = next(key for key in rows if key[0] == "prefill")
    cells = " | ".join(f"{rows[(*prefill[:3], name)]['ms']:,.0f}" for name in quality["cards"])
    near, far = (context for batch, context in (decoded[0], max(d for d in decoded if d[0] == 1)))
    rates = []
    for name in quality["cards"]:
        first, last = rows["decode", 1, near, name], rows["decode", 1, far, name]
        rate = (last["bytes"] - first["bytes"]) / (last["ms"] - first["ms"]) / 1e6
        rates.append(f"{name} {rate:.1f}")
    return [
        *lines,
        f"| a prompt of {prefill[2]:,} | {cells} |",
        "",
        f"`{COMMANDS['kv']}` on {result['date']} at commit `{result['commit']}`: {result['machine']}, "
        f"{result['threads']} threads; documents: {quality['documents']},",
        f"{quality['tokens']:,} scored tokens, text {quality['text']}; medians of {measured['rounds']} alternating "
        "rounds in one run. From the first row to",
        f"{far:,} tokens a step reads so many GB of keys and values for each second that it takes longer: "
        f"{', '.join(rates)}.",
    ]


def rolling(result: dict[str, Any]) -> list[str]:
    return [
        f"Rolling restart of two servers under load (`python benchmarks/rolling.py`, {result['date']}, commit "
        f"`{result['commit']}`): {result['lost_calls']} of",
        f"{sum(result['answered_calls'].values()) + result['lost_calls']} calls lost; while both were there, the less "
        f"loaded answered {100 * result['balance_of_two']:.0f} %; slowest call: {result['slowest_call_seconds']} s.",
    ]


def host(result: dict[str, Any]) -> list[str]:
    rows = [
        (f"{n} sequences{kind}", result[f"{key}_{n}"])
        for n in (64, 256)
        for kind, key in ((", unedited", "host_ms"), (", each with a program", "programs_ms"))
    ]
    return [
        "| host time of a decode step, forward pass stubbed, 32 layers | ms |",
        "|---|---:|",
        *(f"| {name} | {ms:.2f} |" for name, ms in rows),
        "",
        f"`{COMMANDS['host']}` on {result['date']} at commit `{result['commit']}`: {result['machine']}. With one "
        "neighbour that reads a projection",
        f"a step takes {result['reader_ratio_64']:.2f} and {result['reader_ratio_256']:.2f} times as long; programs "
        f"compiled in steady steps: {result['steady_compilations']}.",
    ]


def beside(result: dict[str, Any]) -> list[str]:
    names = {"alone": "alone", "calibration": "beside a TEAL calibration", "circuit": "beside a search for a circuit"}
    return [
        "| between tokens of an interactive stream, ms | p50 | p99 | longest |",
        "|---|---:|---:|---:|",
        *(
            f"| {names[case]} | {row['p50_ms']:.1f} | {row['p99_ms']:.1f} | {row['max_ms']:.0f} |"
            for case, row in result["cases"].items()
        ),
        "",
        f"`{COMMANDS['beside']}` on {result['date']} at commit `{result['commit']}`: {result['machine']}, "
        f"{result['rounds']} rounds of {result['tokens']} tokens.",
    ]


# How each is measured.
def activations(result: dict[str, Any]) -> list[str]:
    quality, measured = result["quality"], result["speed"]
    card = quality["cards"]["int8"]
    names = {"decode": "tokens a second of {} requests, one step", "prompt": "a prompt of {}, tokens a second"}
    rates = []
    for row in measured["rows"]:
        exact, rounded = (f"{1e3 * row['batch'] / row['ms'][way]:,.0f}" for way in ("float32", "int8"))
        name = names[row["case"]].format(row["batch"])
        rates.append(f"| {name} | {exact} | {rounded} | {row['speedup']:.2f} |")
    return [
        "| SmolLM2-135M, Q4_1; products take activations in | float32 | int8 | ratio |",
        "|---|---:|---:|---:|",
        *rates,
        "",
        f"`{COMMANDS['activations']}` on {result['date']} at commit `{result['commit']}`: {result['machine']}, "
        f"{result['threads']} threads; medians of {measured['rounds']}",
        "alternating rounds in one run. Quality against float32 activations on "
        f"{quality['tokens']:,} held-out tokens ({quality['text']}):",
        f"perplexity times {card['perplexity_ratio']:.4f}, mean KL {card['divergence']:.4f} nats, same first choice "
        f"{100 * card['same_first_choice']:.1f} %. llama.cpp, which always",
        "rounds activations, has KL .0027 and 97 % of 384 tokens of its own against the dequantised model.",
    ]


COMMANDS = {
    "activations": "python benchmarks/activations.py",
    "beside": "python benchmarks/beside.py",
    "cpu": "make bench",
    "faults": "python benchmarks/faults",
    "gpu": "python benchmarks/gpu",
    "heads_causal": "python benchmarks/heads.py --only causal",
    "heads_naive": "python benchmarks/heads.py --only naive",
    "heads_readout": "python benchmarks/heads.py --only readout",
    "host": "python benchmarks/host.py",
    "invariance": "python benchmarks/invariance.py",
    "kv": "python benchmarks/kv.py",
    "load": "python benchmarks/load",
    "monitoring": "python benchmarks/monitoring.py",
    "neurons": "python benchmarks/neurons --only words relations languages decoding",
    "neurons_census": "python benchmarks/neurons --only census",
    "neurons_census_speed": "python benchmarks/neurons --only speed",
    "peers": "python benchmarks/peers",
    "rolling": "python benchmarks/rolling.py",
    "prefill": "python benchmarks/prefill.py",
    "products": "python benchmarks/products.py --ggml DIRECTORY",
    "threads": "python benchmarks/threads.py",
    "shapes": "python benchmarks/shapes.py",
    "sparse_decode": "python benchmarks/sparse --only decode",
    "sparse_quality": "python benchmarks/sparse --only quality",
    "sparse_speed": "python benchmarks/sparse --only speed",
    "step": "python benchmarks/step.py",
    "vectors": "python benchmarks/vectors --only table",
    "vectors_probe": "python benchmarks/vectors --only probe",
    "vectors_readouts": "python benchmarks/vectors --only readouts",
}

Row = tuple[str, str]


def _cpu_row(result: dict[str, Any]) -> list[Row]:
    rows = [
        (
            "decoding one request, float32, over `generate` of transformers",
            f"{result['float32_vs_transformers']:.2f} x",
        ),
        ("the same on the 4-bit codes of the file", f"{result['batch1_vs_transformers']:.2f} x"),
    ]
    if "batch1_vs_llama_cpp" in result:
        rows.append(("the same over llama.cpp on the same file", f"{result['batch1_vs_llama_cpp']:.2f} x"))
    programs = f"{result['programs16_vs_unsteered']:.2f} x"
    return [*rows, ("16 requests with 16 programs, over 16 unsteered", programs)]


def _monitoring_row(result: dict[str, Any]) -> list[Row]:
    worst = max(max(row["watched"], row["against_reference"]) for row in result["batches"].values())
    name = f"watching {result['neurons']:,} neurons and {result['directions']} directions, of decode time"
    return [(name, f"{100 * worst:+.1f} %")]


def _invariance_row(result: dict[str, Any]) -> list[Row]:
    batches = ", ".join(map(str, (1, *result["batches"])))
    name = f"of {result['prompts']} prompts, texts that differ between batches of {batches}"
    return [(name, str(result["different_texts"]))]


def _load_row(result: dict[str, Any]) -> list[Row]:
    name = f"goodput at {result['overload']:.0f} times the capacity, of capacity"
    return [(name, f"{100 * result['goodput_ratio']:.0f} %")]


def _rolling_row(result: dict[str, Any]) -> list[Row]:
    calls = sum(result["answered_calls"].values()) + result["lost_calls"]
    return [(f"calls lost of {calls} in a rolling restart of two servers", str(result["lost_calls"]))]


def _faults_row(result: dict[str, Any]) -> list[Row]:
    lost = sum(any(row["lost"].values()) for row in result["rows"])
    return [(f"planted faults, of {len(result['rows'])}, that cost a neighbour anything", str(lost))]


def _heads_row(result: dict[str, Any]) -> list[Row]:
    table = result["causal"]
    shown = " / ".join(f"{100 * table[name]['success_rate']:.0f} %" for name in ("unedited", "random3", "top3"))
    return [("needles answered: all heads / without 3 drawn heads / without the 3 best retrieval heads", shown)]


def _quality_row(result: dict[str, Any]) -> list[Row]:
    card = result["table"]["fovea"]["0.5"]
    name = f"perplexity over dense with half of the neurons (`fovea`, {100 * card['bytes_read_16']:.0f} % of the bytes)"
    return [(name, f"{card['perplexity_ratio']:.3f}")]


SUMMARIES: dict[str, Callable[[dict[str, Any]], list[Row]]] = {
    "cpu": _cpu_row,
    "faults": _faults_row,
    "heads_causal": _heads_row,
    "invariance": _invariance_row,
    "load": _load_row,
    "monitoring": _monitoring_row,
    "neurons": neurons.effects_rows,
    "peers": peers.summary_rows,
    "rolling": _rolling_row,
    "sparse_quality": _quality_row,
    "vectors": vectors.methods_rows,
    "vectors_probe": vectors.probe_rows,
    "vectors_readouts": vectors.readouts_rows,
}


# By what a result says it is, or else by the name of its file; in the order of the page.
SECTIONS: dict[str, tuple[str, Callable[[dict[str, Any]], list[str]]]] = {
    "cpu": ("Decoding on a CPU", cpu),
    "step": ("Where a decode step goes", cpu_page.step),
    "products": ("Products with stored weights", cpu_page.products),
    "threads": ("Threads", cpu_page.threads),
    "prefill": ("Long prompts beside a stream", cpu_page.prefill),
    "shapes": ("Models in real shapes", cpu_page.shapes),
    "peers": ("Beside other engines", peers.tables),
    "gpu": ("On a GPU", gpu),
    "host": ("What the host does in a step", host),
    "beside": ("Serving beside analysis", beside),
    "activations": ("Activations in 8 bits", activations),
    "invariance": ("Batch invariance", invariance),
    "kv": ("The KV cache in fewer bits, and long contexts", kv),
    "monitoring": ("Watching", monitoring),
    "sparse_quality": ("Sparse inference: quality", sparse_quality),
    "sparse_speed": ("Sparse inference: speed", sparse_speed),
    "sparse_decode": ("Sparse inference: decoding", sparse_decode),
    "heads_causal": ("Retrieval heads: what they do", heads_causal),
    "heads_naive": ("Retrieval heads: finding them", heads_naive),
    "heads_readout": ("Retrieval heads: reading them while decoding", heads_readout),
    "neurons": ("Neurons: what they do", neurons.effects),
    "neurons_census": ("Neurons: the census", neurons.census),
    "neurons_census_speed": ("Neurons: the speed of the census", neurons.census_speed),
    "vectors": ("Vectors: what they do, beside an instruction", vectors.methods),
    "vectors_probe": ("Probes: a served probability", vectors.probe),
    "vectors_readouts": ("Reading activations and features while decoding", vectors.readouts),
    "load": ("Overload", load),
    "rolling": ("Rolling restarts", rolling),
    "faults": ("Faults", faults),
}


def read(path: Path) -> tuple[str, dict[str, Any]]:
    """Kind and content of a result. Raises SystemExit for one that no section is written for."""
    result = json.loads(path.read_text(encoding="utf-8"))
    kind = result.get("kind", path.stem)
    if kind not in SECTIONS:
        raise SystemExit(f"{path.name} is {kind!r}, which has no section in benchmarks/readme.py")
    return kind, result


def section(path: Path) -> list[str]:
    kind, result = read(path)
    return SECTIONS[kind][1](result)


def results() -> tuple[list[Path], list[Path]]:
    """Results to show, and those whose code has changed since they were measured; in the order of their sections."""
    order = list(SECTIONS)
    found = sorted(RESULTS.glob("*.json"), key=lambda path: (order.index(read(path)[0]), path.name))
    fresh = [path for path in found if is_fresh(path)]
    return fresh, [path for path in found if path not in fresh]


def is_fresh(path: Path) -> bool:
    kind, result = read(path)
    return result.get("code") == code_digest(kind)


def performance() -> str:
    """All results, for docs/performance.md."""
    fresh, outdated = results()
    lines: list[str] = []
    for path in fresh:
        lines += ["", f"## {SECTIONS[read(path)[0]][0]}", "", *section(path)]
    if outdated:
        lines += [
            "",
            "## To be measured again",
            "",
            "Their code has changed since the last run, so no figures are shown:",
        ]
        for path in outdated:
            kind, result = read(path)
            run = result.get("environment", result)
            last = f"last run on {run['date']} at commit `{run['commit']}`"
            lines.append(f"- {SECTIONS[kind][0]} (`{COMMANDS[kind]}`, {last})")
    return "\n".join(lines)


def summary() -> str:
    """One table, for README.md."""
    rows = [row for path in results()[0] for row in SUMMARIES.get(read(path)[0], lambda result: [])(read(path)[1])]
    return "\n".join(["", "| measured | figure |", "|---|---:|", *(f"| {name} | {figure} |" for name, figure in rows)])


PAGES = {README: summary, PERFORMANCE: performance}


def updated(text: str, name: str, content: str) -> str:
    before, begin, rest = text.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not (begin and end):
        raise SystemExit(f"{name} lacks the line {BEGIN} or {END}")
    return f"{before}{BEGIN}\n{content}\n\n{END}{after}"


def main() -> int:
    parser = argparse.ArgumentParser(description="The numbers of README.md and docs/performance.md.")
    parser.add_argument("--check", action="store_true", help="change nothing; exit status 1 when they are stale")
    arguments = parser.parse_args()
    for page, content in PAGES.items():
        text = page.read_text(encoding="utf-8")
        new = updated(text, page.name, content())
        if arguments.check and new != text:
            print(
                f"{page.name} is stale: measure again what has changed (benchmarks/measured_code.py), then run "
                "python benchmarks/readme.py, which leaves out what was not",
                file=sys.stderr,
            )
            return 1
        page.write_text(new, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
