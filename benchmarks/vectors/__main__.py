"""Vectors, probes and what reading costs, on the embedded model: what they do on text that had no part in making them.

    python benchmarks/vectors [--only table readouts probe] [--concepts ...] [--methods ...] [--quick]

Each part is a module of benchmarks/vectors, which says what is measured. A whole `table` is written to
benchmarks/results/vectors.json, `readouts` to vectors_readouts.json and `probe` to vectors_probe.json; the first and
the last are measured over gRPC, against a server in a process of its own. `--quick` makes everything small and writes
nothing. The last line is a JSON object, with null for what did not run:

    concepts                   by concept: the method whose effect is largest among the coherent, its effect, that of
                               the instruction, and who wins: "vector", "prompt" or "neither"
    methods                    by method: means over concepts of effect, perplexity ratio and AUROC, and how often
                               each side wins
    captured_row_overhead      of decode time, where each of 8 requests has one row captured a token
    features64_overhead        the same of 64 features read
    probe_brier_vs_base_rate   Brier score of a served probability over that of the base rate: below 1 it is worth
                               something
"""

from patchclamp_server.cpu.compiled_code import keep_compiled_code
from patchclamp_server.threads import configure_threads

configure_threads()
keep_compiled_code()

import argparse
import json
import sys
from pathlib import Path
from statistics import fmean
from typing import Any

# Its modules, and those that benchmarks share.
sys.path.insert(0, str(Path(__file__).parents[1]))
from measure import save
from neurons.shown import say
from serving import serving

from patchclamp import Client
from patchclamp_server.model.load import load_model
from patchclamp_server.model.progress import RichProgress
from vectors import probe, readouts, table
from vectors.concepts import NAMES

PARTS = ("table", "readouts", "probe")
SUMMARY = ("concepts", "methods", "captured_row_overhead", "features64_overhead", "probe_brier_vs_base_rate")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", choices=PARTS, nargs="+", default=PARTS)
    parser.add_argument("--concepts", choices=NAMES, nargs="+", default=NAMES)
    parser.add_argument("--methods", choices=table.EXTRACTORS, nargs="+", default=table.EXTRACTORS)
    parser.add_argument("--quick", action="store_true", help="small, and nothing is written")
    options = parser.parse_args()
    summary: dict[str, Any] = {}
    if {"table", "probe"} & {*options.only}:
        with serving() as server, Client(server.address) as client:
            if "table" in options.only:
                summary |= measure_table(client, options)
            if "probe" in options.only:
                summary |= measure_probe(client, options)
    if "readouts" in options.only:
        summary |= measure_readouts(options)
    print(json.dumps({name: summary.get(name) for name in SUMMARY}))


def measure_table(client: Client, options: argparse.Namespace) -> dict[str, Any]:
    asked: dict[str, Any] = {"concepts": tuple(options.concepts), "methods": tuple(options.methods)}
    small: dict[str, Any] = {
        "changes": (0.3,),
        "choosing": 2,
        "choosing_tokens": 6,
        "prompts": 3,
        "tokens": 8,
        "random_vectors": 1,
    }
    sizes = table.Sizes(**asked, **(small if options.quick else {}))
    found = table.measure(client, sizes)
    if sizes == table.Sizes():
        written("vectors", found)
    return summary_of(found["concepts"])


def measure_probe(client: Client, options: argparse.Namespace) -> dict[str, Any]:
    sizes = probe.Sizes(documents=100) if options.quick else probe.Sizes()
    found = probe.measure(client, probe.brown_passages(sizes), sizes)
    if not options.quick:
        written("vectors_probe", found)
    own = found["served"]
    return {"probe_brier_vs_base_rate": round(own["brier"] / own["brier_base_rate"], 3)}


def measure_readouts(options: argparse.Namespace) -> dict[str, Any]:
    with RichProgress() as progress:
        model = load_model(progress=progress)
    found = readouts.measure(model, readouts.Sizes(tokens=8, rounds=2) if options.quick else readouts.Sizes())
    if not options.quick:
        written("vectors_readouts", found)
    return {f"{name}_overhead": found[name]["mean"] for name in readouts.GOALS}


def written(name: str, found: dict[str, Any]) -> None:
    say(f"written: {save(name, found).name}")


def summary_of(concepts: dict[str, Any]) -> dict[str, Any]:
    by_method: dict[str, list[dict[str, Any]]] = {}
    for concept in concepts.values():
        for method, row in concept["methods"].items():
            by_method.setdefault(method, []).append(row)
    return {
        "concepts": {name: best_of(concept) for name, concept in concepts.items()},
        "methods": {
            method: {name: round(fmean(row[name]["mean"] for row in rows), 3) for name in table.MEASURES}
            | {f"{side}_wins": sum(row["winner"] == side for row in rows) for side in ("vector", "prompt")}
            for method, rows in by_method.items()
        },
    }


def best_of(concept: dict[str, Any]) -> dict[str, Any]:
    method, row = table.best_of(concept)
    prompt = concept["prompt"]["effect"]["mean"]
    return {"method": method, "effect": row["effect"]["mean"], "prompt": prompt, "winner": row["winner"]}


if __name__ == "__main__":
    main()
