"""Writes the numbers of README.md from benchmarks/results/*.json.

python benchmarks/readme.py            rewrite the block between the two markers
python benchmarks/readme.py --check    exit status 1 when the block is stale
"""

import argparse
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
README = ROOT / "README.md"
RESULTS = ROOT / "benchmarks" / "results"
BEGIN = "<!-- numbers: begin (written by benchmarks/readme.py from benchmarks/results) -->"
END = "<!-- numbers: end -->"


def cpu(result: dict[str, Any]) -> list[str]:
    speed = result["tokens_per_second"]
    rows = [
        ("one request: `generate` of transformers", speed["transformers_batch1"], "1"),
        ("one request: Patchclamp", speed["patchclamp_batch1"], f"{result['batch1_vs_transformers']:.2f}"),
        ("16 requests, unsteered", speed["patchclamp_16_unsteered"], "1"),
        ("16 requests, 16 programs", speed["patchclamp_16_programs"], f"{result['programs16_vs_unsteered']:.2f}"),
    ]
    versions = ", ".join(f"{name} {version}" for name, version in result["versions"].items())
    return [
        "| SmolLM2-135M, float32, greedy decoding on a CPU | tokens/s | ratio |",
        "|---|---:|---:|",
        *(f"| {name} | {tokens:.1f} | {ratio} |" for name, tokens, ratio in rows),
        "",
        f"`make bench` on {result['date']} at commit `{result['commit']}`: {result['machine']}, "
        f"{result['threads']} threads, {versions};",
        f"{result['tokens']} tokens a request, medians of {result['rounds']} alternating rounds in one run.",
    ]


SECTIONS: dict[str, Callable[[dict[str, Any]], list[str]]] = {"cpu": cpu}


def block() -> str:
    """Both markers and what belongs between them. Raises SystemExit for a result no section is written for."""
    lines: list[str] = []
    for path in sorted(RESULTS.glob("*.json")):
        if path.stem not in SECTIONS:
            raise SystemExit(f"{path.relative_to(ROOT)} has no section in benchmarks/readme.py")
        lines += ["", *SECTIONS[path.stem](json.loads(path.read_text(encoding="utf-8")))]
    return "\n".join([BEGIN, *lines, "", END])


def updated(text: str) -> str:
    before, begin, rest = text.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not (begin and end):
        raise SystemExit(f"{README.name} lacks the line {BEGIN} or {END}")
    return before + block() + after


def main() -> int:
    parser = argparse.ArgumentParser(description="The numbers of README.md.")
    parser.add_argument("--check", action="store_true", help="change nothing; exit status 1 when they are stale")
    arguments = parser.parse_args()
    text = README.read_text(encoding="utf-8")
    new = updated(text)
    if arguments.check:
        if new != text:
            print("README.md is stale: run python benchmarks/readme.py", file=sys.stderr)
            return 1
        return 0
    README.write_text(new, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
