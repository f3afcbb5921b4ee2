"""The results of this benchmark as tables of docs/performance.md and rows of README.md (benchmarks/readme.py)."""

from typing import Any

METHODS = {
    "average_precision": "average precision",
    "gradient_times_activation": "gradient times activation",
}


def effects(result: dict[str, Any]) -> list[str]:
    """Words, relations and languages, then how long decoding takes."""
    return [
        *_words(result["words"]),
        "",
        *_relations(result["relations"]),
        "",
        *_languages(result["languages"]),
        "",
        *_decoding(result["decoding"]),
        "",
        f"`python benchmarks/neurons --only words relations languages decoding` on {result['date']} at commit "
        f"`{result['commit']}`: {result['machine']}.",
    ]


def _words(rows: dict[str, Any]) -> list[str]:
    return [
        "| SmolLM2-135M; log p of a word after neutral prompts | neuron | unedited | clamped | best of 20 random |",
        "|---|---|---:|---:|---:|",
        *(
            f"| {word} | {row['neuron']} at {row['value']:+g} | {row['unedited']:.2f} | {row['clamped']:.2f} | "
            f"{row['random_best']:.2f} |"
            for word, row in rows.items()
        ),
    ]


def _relations(result: dict[str, Any]) -> list[str]:
    fractions = result["sizes"]["fractions"]
    lines = [
        "| relation: its neurons at zero; change of log p of the answers | "
        + " | ".join(f"{fraction:.0%}" for fraction in fractions)
        + " | random sets | beyond random | worst other relation | accuracy | selective |",
        "|---|" + "---:|" * (len(fractions) + 4) + "---|",
    ]
    for name, by_method in result["relations"].items():
        for method, row in by_method.items():
            curve, accuracy = row["target"]["log_probability"], row["target"]["accuracy"][-1]
            whole, worst = curve[-1], min(side["change"] for side in row["sides"].values())
            cells = [f"{each['change']:+.2f}" for each in curve]
            cells += [f"{whole['random_mean']:+.2f}", _beyond(whole), f"{worst:+.2f}"]
            cells += [f"{accuracy['unedited']:.2f} → {accuracy['unedited'] + accuracy['change']:.2f}"]
            lines.append(f"| {name}, {METHODS[method]} | " + " | ".join(cells) + f" | {_yes(row['selective'])} |")
    sizes = result["sizes"]
    return [
        *lines,
        "",
        f"{sizes['neurons']} neurons a set, {sizes['random_sets']} random sets with as many in each layer, at most "
        f"{sizes['facts']} facts that the model knows, of countries that the search has not seen.",
        "Beyond random: the change less that of the random sets, with a bootstrap interval of 95 %. Accuracy is among "
        "two other answers of the same relation: what falls is how likely",
        "any answer of the relation is, and the right one may remain the likeliest of them.",
    ]


def _languages(result: dict[str, Any]) -> list[str]:
    fractions = result["sizes"]["fractions"]
    lines = [
        "| language: its neurons at zero; perplexity over unedited | neurons | "
        + " | ".join(f"{fraction:.0%}" for fraction in fractions)
        + " | random sets | beyond random, perplexity | other languages | selective |",
        "|---|" + "---:|" * (len(fractions) + 4) + "---|",
    ]
    for name, row in result["languages"].items():
        whole = row["target"][-1]
        cells = [f"{row['neurons']}", *(f"{_factor(each):.2f}" for each in row["target"])]
        cells += [f"{1 + whole['random_mean'] / whole['unedited']:.2f}", _beyond(whole)]
        cells += [", ".join(f"{other} {_factor(side):.2f}" for other, side in row["sides"].items())]
        lines.append(f"| {name} | " + " | ".join(cells) + f" | {_yes(row['selective'])} |")
    return lines


def _decoding(result: dict[str, Any]) -> list[str]:
    shape = result["extrapolated_8b_shape"]
    hours = result["extrapolated_8b_seconds"] / 3600
    return [
        f"Decoding the gate, up and down rows of all {result['neurons']:,} neurons takes {result['seconds']:.0f} s. "
        f"Of an 8B shape ({shape['n_layers']} layers of {shape['d_ff']:,} neurons,",
        f"width {shape['d_model']:,}, {shape['vocab_size']:,} tokens) it would take {hours:.1f} hours on this machine: "
        "extrapolated by the number of products, not measured.",
    ]


def census(result: dict[str, Any]) -> list[str]:
    killed = result["killed"]
    columns = ("dead", "rare", "always", "token_detectors", "ngram_detectors", "positional")
    lines = [
        "| census of SmolLM2-135M, tokens | peak memory, MiB | neurons | dead | rare | always on | token detectors | "
        "n-gram detectors | positional |",
        "|---:|" + "---:|" * 8,
    ]
    for row in result["memory"].values():
        cells = [f"{row['tokens']:,}", f"{row['peak_rss_bytes'] / 2**20:,.0f}", f"{row['neurons']:,}"]
        lines.append("| " + " | ".join([*cells, *(f"{row[name]:,}" for name in columns)]) + " |")
    return [
        *lines,
        "",
        f"Peak memory of the longer over that of the shorter: {result['census_rss_growth_ratio']:.3f}. After a kill -9 "
        f"at {killed['seen']:,} tokens it went on from {killed['resumed_tokens']:,}; a checkpoint is every "
        f"{killed['checkpoint_tokens']:,}.",
        "",
        f"`python benchmarks/neurons --only census` on {result['date']} at commit `{result['commit']}`: "
        f"{result['machine']}; text {result['text']}.",
    ]


def census_speed(result: dict[str, Any]) -> list[str]:
    rate, streams = result["rate"], result["streams"]
    speeds = rate["tokens_per_second"]
    return [
        "| a stream of one request | p50 between tokens, ms | p99, ms | first token, ms |",
        "|---|---:|---:|---:|",
        *(
            f"| {name} | {row['p50_ms']:.1f} | {row['p99_ms']:.1f} | {row['first_ms']:.0f} |"
            for name, row in (("alone", streams["alone"]), ("beside a census", streams["beside"]))
        ),
        "",
        f"A census of {rate['tokens']:,} tokens, by turns with plain requests of the same windows: "
        f"{speeds['census']:.0f} against {speeds['plain']:.0f} tokens/s, {100 * rate['ratio']:.0f} %.",
        "",
        f"`python benchmarks/neurons --only speed` on {result['date']} at commit `{result['commit']}`: "
        f"{result['machine']}; text {result['text']}.",
    ]


def effects_rows(result: dict[str, Any]) -> list[tuple[str, str]]:
    words = result["words"].values()
    relations = [row["average_precision"] for row in result["relations"]["relations"].values()]
    languages = result["languages"]["languages"].values()
    return [
        ("words that clamping their first neuron raises above 20 random ones", _share(row["raised"] for row in words)),
        ("relations whose neurons at zero take down them alone", _share(row["selective"] for row in relations)),
        ("languages whose neurons at zero cost them most", _share(row["selective"] for row in languages)),
    ]


def _share(found: Any) -> str:
    listed = list(found)
    return f"{sum(listed)} of {len(listed)}"


def _beyond(row: dict[str, Any]) -> str:
    low, high = row["beyond_random_low"], row["beyond_random_high"]
    return f"{row['beyond_random']:+.2f} ({low:+.2f} to {high:+.2f})"


def _factor(row: dict[str, Any]) -> float:
    return float(1 + row["change"] / row["unedited"])


def _yes(found: bool) -> str:
    return "yes" if found else "no"
