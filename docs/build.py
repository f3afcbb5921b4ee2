"""Builds the documentation into build/docs. A link or an anchor that leads nowhere fails it.

    python docs/build.py [--to DIRECTORY]

Pages are the Markdown files of docs/, those of PAGES, which live elsewhere, and the reference of the API, which is made
of the protos. Pictures are drawn from the results of benchmarks/peers, sparse and vectors. Links are written as a
reader of the repository follows them; here they are led to the pages.
"""

import argparse
import json
import re
import shutil
import sys
import tempfile
from dataclasses import fields
from pathlib import Path
from posixpath import dirname, normpath, relpath

from api_reference import reference
from sphinx.cmd.build import build_main

# What benchmarks draw of their own results.
sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))
from peers.picture import rates_figure

from patchclamp.pictures.probes import reliability_figure
from patchclamp.pictures.quality import quality_figure, series_of
from patchclamp.results import ProbeReport, ReliabilityBin

DOCS = Path(__file__).parent
ROOT = DOCS.parent
# Pages that live outside of docs/.
PAGES = ("CHANGELOG.md", "CONTRIBUTING.md", "deploy/README.md", "examples/README.md")
_LINK = re.compile(r"\[([^\]]+)\]\(([^)#\s]+)(#[^)\s]*)?\)")


def assemble(into: Path) -> None:
    """Writes the sources of all pages. Raises ValueError for a link to a file that is not there."""
    for path in sorted(DOCS.rglob("*.md")):
        _write(into, path.relative_to(ROOT).as_posix())
    for name in PAGES:
        _write(into, name)
    (into / "reference").mkdir()
    (into / "reference" / "api.md").write_text(reference(ROOT / "proto"), encoding="utf-8")
    shutil.copy(DOCS / "conf.py", into)
    series = series_of((ROOT / "benchmarks/results/sparse_quality.json").read_text(encoding="utf-8"))
    (into / "images").mkdir()
    quality_figure(series).savefig(into / "images" / "sparse_quality.svg")
    peers = ROOT / "benchmarks/results/peers.json"
    if peers.exists():
        rates_figure(json.loads(peers.read_text(encoding="utf-8"))).savefig(into / "images" / "peers.svg")
    served = ROOT / "benchmarks/results/vectors_probe.json"
    if served.exists():
        title = "Fiction, of held-out documents"
        reliability_figure(_served_report(served), title).savefig(into / "images" / "vectors_probe.svg")


def _served_report(path: Path) -> ProbeReport:
    """The report of a probe, of texts that it was served for."""
    result = json.loads(path.read_text(encoding="utf-8"))
    stored = result["report"] | result["served"]
    bins = tuple(ReliabilityBin(**each) for each in stored["reliability"])
    kept = {each.name: stored[each.name] for each in fields(ProbeReport)}
    return ProbeReport(**kept | {"reliability": bins})


def _write(into: Path, path: str) -> None:
    page = into / _page(path)
    page.parent.mkdir(parents=True, exist_ok=True)
    page.write_text(
        _LINK.sub(lambda match: _led(path, match), (ROOT / path).read_text(encoding="utf-8")), encoding="utf-8"
    )


def _page(path: str) -> str:
    return path.removeprefix("docs/")


def _led(path: str, link: re.Match[str]) -> str:
    """The link to the page of its target; files that are no pages are named instead."""
    text, target, anchor = link[1], link[2], link[3] or ""
    if re.match(r"[a-z]+:", target):
        return link[0]
    named = normpath(f"{dirname(path)}/{target}" if dirname(path) else target)
    if named.startswith("docs/") or named in PAGES:
        return f"[{text}]({relpath(_page(named), dirname(_page(path)) or '.')}{anchor})"
    if not (ROOT / named).exists():
        raise ValueError(f"{path} links to {named}, which is not there")
    return f"`{named}`" if text.strip("`") == named else f"{text} (`{named}`)"


def main() -> int:
    parser = argparse.ArgumentParser(description="Builds the documentation.")
    parser.add_argument("--to", type=Path, default=ROOT / "build" / "docs")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        assemble(Path(scratch))
        return build_main(["-b", "html", "-W", "--keep-going", "-q", "-E", scratch, str(arguments.to)])


if __name__ == "__main__":
    sys.exit(main())
