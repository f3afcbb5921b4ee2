"""The result of this benchmark as tables of docs/performance.md and rows of README.md (benchmarks/readme.py)."""

from collections.abc import Mapping
from typing import Any

from peers.cases import BATCHES, EDITED, LONGEST, PREFILLS, READ, STEERING, decode_name
from peers.environments import LLAMA, OURS
from peers.figures import ONLY_OURS
from peers.summary import KEEP50

Row = dict[str, Any]
Cards = Mapping[str, Mapping[str, Mapping[str, Any]]]

_STEERING = {
    "unsteered": "unsteered",
    "one layer": "a vector at one layer",
    "all layers": "vectors at all layers but the first",
    "programs": "as many different programs",
}
MIB = 1 << 20
# A mean KL below this is rounding of float32.
ROUNDING = 1e-6
# Title, figure, how a value is shown, and whether less is better.
RATES = [
    *(
        (f"{batch} request{'s' if batch > 1 else ''}, {_STEERING[steering]}", decode_name(batch, steering))
        for batch in BATCHES
        for steering in STEERING
        if batch > 1 or steering != "programs"
    ),
    ("16 requests, 16 programs of every kind of edit", EDITED),
    *((f"prompt of {length:,} tokens", f"prefill {length}") for length in (*PREFILLS, LONGEST)),
    *((f"one request after {length:,} tokens", f"decode at {length}") for length in (*PREFILLS, LONGEST)),
    (f"residual stream of all layers of {READ} tokens read", f"read {READ}"),
]
COSTS = [
    ("start to ready, s", "ready", "{:.1f}", 1),
    ("resident memory at rest, MiB", "memory at rest", "{:.0f}", MIB),
    ("peak of it, 16 requests, MiB", "memory under load", "{:.0f}", MIB),
    ("mean KL from float32, unsteered, nats", "mean KL, unsteered", "{:.1e}", 1),
    ("mean KL from float32, steered at all layers", "mean KL, all layers", "{:.1e}", 1),
]
EQUAL = [
    ("first choices as in float32, unsteered", "first choices equal, unsteered"),
    ("first choices as in float32, steered at all layers", "first choices equal, all layers"),
]


def tables(result: Row) -> list[str]:
    peers, figures = list(result["peers"]), result["figures"]
    titles = [f"{_title(peer, result)}" for peer in peers]
    lines = [
        "![Tokens a second of each engine, by case](images/peers.svg)",
        "",
        f"| SmolLM2-135M on a CPU, tokens/s | {' | '.join(titles)} |",
        "|---|" + "---:|" * len(peers),
    ]
    for title, name in RATES:
        if name in figures:
            lines.append(_row(title, figures[name], peers, "{:.1f}", 1, most=True))
    lines += ["", f"| | {' | '.join(peers)} |", "|---|" + "---:|" * len(peers)]
    for title, name, form, unit in COSTS:
        if name in figures:
            lines.append(_row(title, figures[name], peers, form, unit, most=False))
    for title, name in EQUAL:
        if name in figures:
            lines.append(_row(title, figures[name], peers, "{:.1%}", 1, most=True))
    return [*lines, "", *_behind(figures), *_reasons(figures, peers), *_sparse(figures), *_made(result)]


def _title(peer: str, result: Row) -> str:
    versions = result["peers"][peer].get("versions", {})
    own = versions.get({LLAMA: "llama-cpp-python"}.get(peer, peer))
    return f"{peer} {own}" if own and peer != OURS else peer


def _row(title: str, cards: Mapping[str, Row], peers: list[str], form: str, unit: float, *, most: bool) -> str:
    """The best in bold."""
    values = {peer: cards[peer]["value"] for peer in peers}
    known = [value for value in values.values() if value is not None]
    best = (max if most else min)(known, default=None)
    cells = [
        "—" if value is None else f"**{form.format(value / unit)}**" if value == best else form.format(value / unit)
        for value in values.values()
    ]
    return f"| {title} | {' | '.join(cells)} |"


def behind(figures: Cards) -> list[tuple[str, str, float]]:
    """Rows in which a peer is better than we are: title, the best peer, and what we have of it (of costs, what it
    has of ours); the worst first."""
    rows = [(title, name, True) for title, name in (*RATES, *EQUAL)]
    rows += [(title.partition(",")[0], name, False) for title, name, _, _ in COSTS]
    found = []
    for title, name, most in rows:
        values = {peer: card["value"] for peer, card in figures.get(name, {}).items() if card["value"] is not None}
        if name.startswith("mean KL"):
            values = {peer: max(value, ROUNDING) for peer, value in values.items()}
        ours = values.pop(OURS, None)
        if ours is None or not values:
            continue
        peer = (max if most else min)(values, key=lambda each: values[each])
        part = ours / values[peer] if most else values[peer] / ours if ours else 1.0
        if part < 1:
            found.append((title, peer, part))
    return sorted(found, key=lambda row: row[2])


def _behind(figures: Cards) -> list[str]:
    rows = behind(figures)
    if not rows:
        return ["No peer is better than Patchclamp in any row.", ""]
    lines = ["Where a peer is better, and what Patchclamp has of it:"]
    return [*lines, "", *(f"- {title}: {part:.2f} of {peer}" for title, peer, part in rows), ""]


def _reasons(figures: Cards, peers: list[str]) -> list[str]:
    """Why cells are empty, each reason once, and which rates are those of requests one after the other."""
    why: dict[tuple[str, str], list[str]] = {}
    for name, cards in figures.items():
        for peer in peers:
            if peer != OURS and cards[peer]["value"] is None and cards[peer]["reason"] != ONLY_OURS:
                why.setdefault((peer, cards[peer]["reason"]), []).append(name)
    turns = sorted({p for cards in figures.values() for p in peers if cards[p].get("how") == "one after the other"})
    lines = [f"— of {peer} ({', '.join(names)}): {reason.splitlines()[-1]}." for (peer, reason), names in why.items()]
    if turns:
        lines.append(f"Different programs are run one after the other by {', '.join(turns)}.")
    return [*lines, ""] if lines else []


def _sparse(figures: Cards) -> list[str]:
    """Policies against the dense model in the same rounds."""
    dense = figures.get(decode_name(1, "unsteered"), {}).get(OURS, {}).get("value")
    named = {name.removeprefix(KEEP50): cards[OURS]["value"] for name, cards in figures.items() if KEEP50 in name}
    known = [(policy, value) for policy, value in named.items() if value is not None]
    if not dense or not known:
        return []
    each = ", ".join(f"{policy} {value / dense:.2f}" for policy, value in sorted(known, key=lambda row: -row[1]))
    return [f"One request of Patchclamp with half of the neurons, over dense: {each}.", ""]


def _made(result: Row) -> list[str]:
    fewest = min((c["rounds"] for cards in result["figures"].values() for c in cards.values() if c["value"]), default=0)
    settings = {peer: _settings(said) for peer, said in result["peers"].items()}
    server = result["server"]
    return [
        *(f"- {peer}: {words}" for peer, words in settings.items()),
        "",
        f"`python benchmarks/peers` on {result['date']} at commit `{result['commit']}`: {result['machine']}, "
        f"{result['threads']} threads, {result['minutes']:.0f} minutes, medians of {fewest} to "
        f"{max(len(c.get('values', [])) for cards in result['figures'].values() for c in cards.values())} "
        "alternating rounds",
        f"(`benchmarks/peers/cases.py`), prompts of {result['prompt']} tokens where no other length is said. "
        f"llama.cpp and Patchclamp run `{result['file']}` ({result['file_bytes'] / MIB:.0f} MiB), the others the "
        "float32 weights",
        f"that it dequantises to. `patchclamp serve` itself is ready in {server['ready']['value']:.1f} s with "
        f"{server['memory']['value'] / MIB:.0f} MiB resident.",
    ]


def _settings(said: Row) -> str:
    if "error" in said:
        return str(said["error"])
    return f"{said['settings']}; threads that wait: {said['waits']}"


def summary_rows(result: Row) -> list[tuple[str, str]]:
    ratios = result["summary"]
    named = {
        "batch1_vs_llama_cpp": "one request over llama.cpp on the same 4-bit file",
        "batch8_vs_llama_cpp": "8 requests over llama.cpp",
        "batch64_vs_llama_cpp": "64 requests over llama.cpp",
        "programs16_vs_llama_cpp": "16 requests with 16 programs over llama.cpp, which takes turns",
        "prefill2048_vs_llama_cpp": "a prompt of 2,048 tokens over llama.cpp",
    }
    return [(words, f"{ratios[name]['value']:.2f} x") for name, words in named.items() if ratios[name]]
