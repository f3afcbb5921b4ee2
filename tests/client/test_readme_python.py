"""The Python of the README and of the guide to steering.

What stands under "Python", and the guide, runs on the embedded model; the rest of the README names what there is.
"""

import ast
import importlib
import inspect
import re
from pathlib import Path

import pytest
from live import LiveServer

from patchclamp import Client

ROOT = Path(__file__).parents[2]
GUIDE = ROOT / "docs/user/steering.md"
PAIRS = ROOT / "benchmarks/data/concepts/joyful_sad.jsonl"


def blocks(section: str = "", document: Path = ROOT / "README.md") -> list[str]:
    """Of one section, or of all."""
    text = document.read_text(encoding="utf-8")
    if section:
        text = text.split(f"\n## {section}\n")[1].split("\n## ")[0]
    return re.findall(r"^```python\n(.*?)^```", text, re.DOTALL | re.MULTILINE)


def extract(server: LiveServer, layers: list[int]) -> None:
    """The vector that all of them use."""
    with Client(server.address) as client:
        pairs = [tuple(ast.literal_eval(line).values()) for line in PAIRS.read_text(encoding="utf-8").splitlines()[:8]]
        client.extract_vectors(pairs, layers=layers, tags=["joyful_sad"], replace_tags=True).result()


def test_the_examples_of_the_clients_run(
    embedded_server: LiveServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    examples = blocks("Python")
    assert len(examples) == 2
    extract(embedded_server, [15, 16])
    for example in examples:
        exec(example.replace("localhost:50051", embedded_server.address), {"__name__": "readme"})
    # The comment of the example says what it prints.
    assert "INVALID_ARGUMENT program.edits[0].layers[0] unknown layer 99: the model has 30" in capsys.readouterr().out


def test_the_sweep_of_the_guide_runs(embedded_server: LiveServer, capsys: pytest.CaptureFixture[str]) -> None:
    (example,) = blocks(document=GUIDE)
    extract(embedded_server, [8, 12, 16, 21, 25])
    exec(example.replace("localhost:50051", embedded_server.address), {"__name__": "guide"})
    rows = [line.split() for line in capsys.readouterr().out.splitlines()]
    # Layer, strength, effect, that of a random vector, ratio of perplexities.
    assert [len(row) for row in rows] == [5] * 20


@pytest.mark.parametrize("example", blocks())
def test_an_example_calls_what_there_is_with_options_that_it_takes(example: str) -> None:
    tree = ast.parse(example)
    known: dict[str, object] = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("patchclamp"):
            module = importlib.import_module(node.module or "")
            known.update({alias.name: getattr(module, alias.name) for alias in node.names})
    calls = 0
    for node in ast.walk(tree):
        if not isinstance(node, ast.Call):
            continue
        match node.func:
            case ast.Name(id=name) if name in known:
                called = known[name]
            case ast.Attribute(value=ast.Name(id="client"), attr=name):
                called = getattr(Client, name)
            case _:
                continue
        calls += 1
        taken = inspect.signature(called).parameters  # type: ignore[arg-type]
        assert {keyword.arg for keyword in node.keywords if keyword.arg} <= set(taken), name
    assert calls
