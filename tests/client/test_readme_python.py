"""The Python of the README: what stands under "Python" runs on the embedded model, the rest names what there is."""

import ast
import importlib
import inspect
import re
from pathlib import Path

import pytest
from live import LiveServer

from patchclamp import Client

ROOT = Path(__file__).parents[2]
PAIRS = ROOT / "benchmarks/data/concepts/joyful_sad.jsonl"


def blocks(section: str = "") -> list[str]:
    """Of one section, or of all."""
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    if section:
        text = text.split(f"\n## {section}\n")[1].split("\n## ")[0]
    return re.findall(r"^```python\n(.*?)^```", text, re.DOTALL | re.MULTILINE)


def test_the_examples_of_the_clients_run(
    embedded_server: LiveServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    examples = blocks("Python")
    assert len(examples) == 2
    with Client(embedded_server.address) as client:
        pairs = [tuple(ast.literal_eval(line).values()) for line in PAIRS.read_text(encoding="utf-8").splitlines()[:8]]
        client.extract_vectors(pairs, layers=[15, 16], tags=["joyful_sad"], replace_tags=True).result()
    for example in examples:
        exec(example.replace("localhost:50051", embedded_server.address), {"__name__": "readme"})
    # The comment of the example says what it prints.
    assert "INVALID_ARGUMENT program.edits[0].layers[0] unknown layer 99: the model has 30" in capsys.readouterr().out


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
