"""The results of this benchmark as tables of docs/performance.md and rows of README.md (benchmarks/readme.py)."""

from typing import Any

Row = dict[str, Any]
# Who wins, as the table says it.
WINNERS = {"vector": "vector", "prompt": "**prompting**", "neither": "not told apart"}
READ = {"captured_row": "one captured row a request", "features64": "64 features read a request"}


def methods(result: Row) -> list[str]:
    """A table for each concept, with an instruction, random vectors and no edit beside the vectors, and a verdict."""
    sizes = result["sizes"]
    lines = [
        "Vectors for SmolLM2-135M, found from pairs of texts, at the strength that `CalibrateVector` chose (the knee), "
        f"on {sizes['prompts']} held-out prompts. Effect: how much likelier",
        "held-out texts with the concept become than texts without, nats a token, beside random vectors of equal "
        "length; and at the largest strength that the choice found safe.",
        "Perplexity: of the unsteered model on the text that is written, over that on its own. Change: of the norm of "
        "the activations. AUROC: of texts that no vector was",
        "made of. In brackets: 95 % by bootstrap.",
        "Prompting: a user asks in a chat for a text, with the instruction or without; the prompt begins the answer.",
    ]
    for name, concept in result["concepts"].items():
        lines += ["", *_concept(name, concept, result["bounds"])]
    return [
        *lines,
        "",
        f"`python benchmarks/vectors --only table` on {result['date']} at commit `{result['commit']}`: "
        f"{result['machine']}, {result['seconds'] / 60:.0f} minutes.",
    ]


def _concept(name: str, concept: Row, bounds: Row) -> list[str]:
    prompt, unsteered = concept["prompt"], concept["unsteered"]
    none = " | ".join(["", "", "0", "", *_text(unsteered), "", ""])
    own = [_method(method, row) for method, row in concept["methods"].items()]
    told = [_interval(prompt["effect"], signed=True), "", *_text(prompt), _interval(prompt["auroc"]), ""]
    return [
        f"| {name.replace('_', ' / ')} | layer, change | effect | at the end of the safe range | perplexity | "
        "repetition | with its words | AUROC | larger effect |",
        "|---|---|---:|---:|---:|---:|---:|---:|---|",
        *own,
        *_random(concept["methods"]),
        f"| prompting: “{prompt['instruction']}” | | {' | '.join(told)} |",
        f"| no edit {none} |",
        "",
        _verdict(concept, bounds),
    ]


def _method(name: str, row: Row) -> str:
    place = f"{row['layer']}, {row['change']:.0%}" + ("" if row["is_safe"] else ", not safe")
    most = f"{row['most_change']:.0%}: {row['most_effect']['mean']:+.2f}" if row["is_safe"] else ""
    cells = [place, _interval(row["effect"], signed=True), most, *_text(row), _interval(row["auroc"])]
    return f"| {name.replace('_', ' ')} | {' | '.join(cells)} | {WINNERS[row['winner']]} |"


def _random(methods: Row) -> list[str]:
    """A row for each length that vectors have: most methods share it."""
    found: dict[tuple[int, float], Row] = {}
    for row in methods.values():
        found.setdefault((row["layer"], row["change"]), row)
    lines = []
    for (layer, change), row in sorted(found.items()):
        auroc = f"{row['random_auroc']:.2f}"
        cells = [_interval(row["random_effect"], signed=True), "", *_text(row["random"]), auroc, ""]
        lines.append(f"| random vectors | {layer}, {change:.0%} | {' | '.join(cells)} |")
    return lines


def _text(row: Row) -> list[str]:
    ratio, repetition, words = (row[name]["mean"] for name in ("perplexity_ratio", "repetition", "words"))
    return [f"{ratio:.2f}", f"{repetition:.2f}", f"{words:.0%}"]


def _verdict(concept: Row, bounds: Row) -> str:
    """Says in words who wins, of the methods that are coherent."""
    by_winner = {
        winner: [name for name, row in concept["methods"].items() if row["winner"] == winner] for winner in WINNERS
    }
    beaten, prompted = (
        ", ".join(name.replace("_", " ") for name in by_winner[winner]) for winner in ("vector", "prompt")
    )
    if len(by_winner["prompt"]) == len(concept["methods"]):
        verdict = "Prompting wins over every method."
    elif prompted:
        verdict = f"Prompting wins over {prompted}."
    else:
        verdict = "Prompting wins over no method."
    if beaten:
        verdict += f" It is beaten by {beaten}."
    farther = [
        name.replace("_", " ")
        for name, row in concept["methods"].items()
        if row["winner"] != "vector" and row["is_safe"] and row["most_beyond_prompt"]["low"] > 0
    ]
    if farther:
        verdict += f" At the end of the safe range the effect of {', '.join(farther)} is larger than its own."
    prompt = concept["prompt"]
    if prompt["perplexity_ratio"]["mean"] > bounds["perplexity_ratio"]:
        verdict += f" What it makes the model write has {prompt['perplexity_ratio']['mean']:.1f} times the perplexity."
    return verdict


def readouts(result: Row) -> list[str]:
    sizes, step = result["sizes"], result["step_milliseconds"]
    return [
        f"| decode steps of {sizes['batch']} requests of SmolLM2-135M on a CPU | ms | overhead | bound |",
        "|---|---:|---:|---:|",
        f"| nothing read | {step['none']:.2f} | | |",
        *(
            f"| {title} | {step[name]:.2f} | {_percent(result[name])} | {result['goals'][name]:.0%} |"
            for name, title in READ.items()
        ),
        "",
        f"`python benchmarks/vectors --only readouts` on {result['date']} at commit `{result['commit']}`: "
        f"{result['machine']}, {result['threads']} threads,",
        f"{sizes['rounds']} alternating rounds of {sizes['tokens']} tokens a request in one run; medians of the ratios "
        "of rounds, with 95 % by bootstrap over rounds.",
    ]


def probe(result: Row) -> list[str]:
    served, report = result["served"], result["report"]
    less = served["less_than_base_rate"]
    layers = ", ".join(map(str, result["layers"]))
    return [
        "![How often a text had the label, by the probability that the probe served](images/vectors_probe.svg)",
        "",
        "| probability served | texts | mean probability | share that is fiction |",
        "|---|---:|---:|---:|",
        *(
            f"| {each['low']:.1f} to {each['high']:.1f} | {each['texts']} | {each['mean_probability']:.2f} | "
            f"{each['share']:.2f} |"
            for each in served["reliability"]
        ),
        "",
        f"Brier score {served['brier']:.3f}, base rate {served['brier_base_rate']:.3f} (difference "
        f"{served['brier'] - served['brier_base_rate']:+.3f}, {less['low']:+.3f} to {less['high']:+.3f}); accuracy "
        f"{served['accuracy']:.2f}, of the more frequent label {served['base_rate']:.2f};",
        f"AUROC {served['auroc']:.2f}. Of {served['texts']} passages of {result['sizes']['words']} words from "
        "documents that training and calibration have not seen, fiction or informative prose: the",
        f"probability that a readout of the probe (layer {layers}) serves with the last token. Calibration error "
        f"{served['calibration_error']:.3f} (mean distance of both columns, by texts);",
        f"right probabilities would have one up to {served['calibration_error_by_chance']:.3f} with so few texts (95 % "
        "of draws). `TrainProbe` itself reported a Brier score of",
        f"{report['brier']:.3f} on {report['texts']} texts, {report['brier_uncalibrated']:.3f} before calibration.",
        "",
        f"`python benchmarks/vectors --only probe` on {result['date']} at commit `{result['commit']}`: "
        f"{result['machine']}; text {result['text']}.",
    ]


def methods_rows(result: Row) -> list[tuple[str, str]]:
    rows = [row for concept in result["concepts"].values() for row in concept["methods"].values()]
    wins = [sum(row["winner"] == side for row in rows) for side in ("vector", "prompt")]
    name = f"of {len(rows)} vectors by all methods, those with a larger effect than an instruction / with a smaller one"
    return [(name, " / ".join(map(str, wins)))]


def readouts_rows(result: Row) -> list[tuple[str, str]]:
    return [(f"{title}, of decode time", f"{100 * result[name]['mean']:+.1f} %") for name, title in READ.items()]


def probe_rows(result: Row) -> list[tuple[str, str]]:
    served = result["served"]
    name = "Brier score of a served probability on held-out text / of the base rate"
    return [(name, f"{served['brier']:.3f} / {served['brier_base_rate']:.3f}")]


def _interval(row: Row, *, signed: bool = False) -> str:
    sign = "+" if signed else ""
    return f"{row['mean']:{sign}.2f} ({row['low']:{sign}.2f} to {row['high']:{sign}.2f})"


def _percent(row: Row) -> str:
    return f"{100 * row['mean']:+.1f} % ({100 * row['low']:+.1f} to {100 * row['high']:+.1f})"
