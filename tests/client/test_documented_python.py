"""Every Python block of README.md and of docs/ runs, page by page and in order, on a real server."""

import ast
import importlib
import inspect
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from live import LiveServer
from tiny_llama import save_tiny_llama

from patchclamp import Client
from patchclamp_server.artifacts.store import ArtifactStore
from patchclamp_server.artifacts.types import ArtifactKind, Tags
from patchclamp_server.model.load import load_model
from patchclamp_server.model.sites import Site

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
PAIRS = ROOT / "benchmarks/data/concepts/joyful_sad.jsonl"
# file-formats.md has a test of its own, which looks at what it stores (test_file_formats_guide.py).
ELSEWHERE = {"docs/user/file-formats.md"}


def blocks(page: Path) -> list[str]:
    return re.findall(r"^```python\n(.*?)^```", page.read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE)


def run(name: str, address: str, **given: object) -> dict[str, Any]:
    """The names that the blocks of a page leave behind; `given` are those that it takes from its reader."""
    names: dict[str, Any] = {"__name__": "example", **given}
    for block in blocks(ROOT / name):
        exec(block.replace("localhost:50051", address), names)
    return names


@pytest.fixture
def client(embedded_server: LiveServer) -> Iterator[Client]:
    """It can use the vector that all pages use."""
    with Client(embedded_server.address) as client:
        pairs = [tuple(ast.literal_eval(line).values()) for line in PAIRS.read_text(encoding="utf-8").splitlines()[:8]]
        layers = [8, 12, 15, 16, 21, 25]
        client.extract_vectors(pairs, layers=layers, tags=["joyful_sad"], replace_tags=True).result()
        yield client


@contextmanager
def traffic(client: Client) -> Iterator[None]:
    """Requests one after the other, for what waits to see some."""
    over = threading.Event()

    def ask() -> None:
        while not over.is_set():
            client.generate("The weather today is lovely and I am", max_tokens=16, ignore_eos=True).result()

    asking = threading.Thread(target=ask)
    asking.start()
    try:
        yield
    finally:
        over.set()
        asking.join()


def test_no_page_with_python_is_left_out() -> None:
    tested = {
        "README.md",
        "docs/operating.md",
        "docs/user/features.md",
        "docs/user/heads.md",
        "docs/user/monitoring.md",
        "docs/user/neurons.md",
        "docs/user/python.md",
        "docs/user/sparse.md",
        "docs/user/steering.md",
    }
    assert {page.relative_to(ROOT).as_posix() for page in PAGES if blocks(page)} == tested | ELSEWHERE


def test_the_example_of_the_readme_runs(
    embedded_server: LiveServer, client: Client, capsys: pytest.CaptureFixture[str]
) -> None:
    del client
    result = run("README.md", embedded_server.address)["result"]
    # The last token of an answer is sampled, and not run.
    assert [edit.rows for edit in result.receipt.edits][:2] == [19, 4 * 19]
    assert len(result.tokens) == 20


def test_the_examples_of_the_client_run(
    embedded_server: LiveServer,
    client: Client,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    del client
    monkeypatch.chdir(tmp_path)
    run("docs/user/python.md", embedded_server.address)
    # The comment of the example says what it prints.
    assert "INVALID_ARGUMENT program.edits[0].layers[0] unknown layer 99: the model has 30" in capsys.readouterr().out


def test_the_sweep_of_the_guide_to_steering_runs(
    embedded_server: LiveServer, client: Client, capsys: pytest.CaptureFixture[str]
) -> None:
    del client
    run("docs/user/steering.md", embedded_server.address)
    rows = [line.split() for line in capsys.readouterr().out.splitlines()]
    # Layer, strength, effect, that of a random vector, ratio of perplexities.
    assert [len(row) for row in rows] == [5] * 20


def test_the_example_of_sparse_inference_runs(tmp_path: Path) -> None:
    # A calibration of the embedded model takes minutes.
    save_tiny_llama(tmp_path / "model", context=1024)
    text = " ".join(f"The {i}th day was like the one before it, and so was the weather." for i in range(160))
    model = load_model(str(tmp_path / "model"))
    with LiveServer(model, tmp_path / "artifacts") as server, Client(server.address) as client:
        result = run("docs/user/sparse.md", server.address, client=client, text=text)["result"]
    assert result.sparsity.policy == "fovea"


def test_the_example_of_watches_runs(embedded_server: LiveServer, client: Client) -> None:
    generator = np.random.default_rng(0)
    given = {"W_enc": generator.normal(size=(576, 8)), "b_enc": np.zeros(8), "chosen": [1, 5]}
    try:
        with traffic(client):
            batch = run("docs/user/monitoring.md", embedded_server.address, client=client, **given)["batch"]
        assert batch.activations
    finally:
        client.stop_watch("safety")
        client.delete_artifact("safety")


def test_the_example_of_features_runs(embedded_server: LiveServer, client: Client) -> None:
    width, n = embedded_server.model.info.d_model, 16
    rows = torch.randn(n, width, generator=torch.Generator().manual_seed(0)) / width**0.5
    ArtifactStore(embedded_server.server.config.artifacts_url).put(
        ArtifactKind.AUTOENCODER,
        {"encoder": rows, "encoder_bias": torch.ones(n), "decoder": rows.clone(), "decoder_bias": torch.zeros(width)},
        model_fingerprint=embedded_server.model.info.fingerprint,
        site=Site.RESID_POST,
        provenance={"layer": 16, "function": "relu", "subtracted": "nothing"},
        tags=Tags(("sae",), replace=True),
    )
    result = run("docs/user/features.md", embedded_server.address, client=client)["result"]
    assert result.receipt.edits[0].rows == 7
    assert {value.name for value in result.readouts} == {"0", "largest"}
    for tag in ("topics", "sae"):
        client.delete_artifact(tag)


def test_the_example_of_retrieval_heads_runs(embedded_server: LiveServer, client: Client) -> None:
    given = {"page": "The key is under the old stone. ", "question": "Where is the key?"}
    answer = run("docs/user/heads.md", embedded_server.address, client=client, **given)["answer"]
    assert answer.grounding is not None
    client.delete_artifact("retrieval")


def test_the_examples_of_neurons_run(embedded_server: LiveServer, client: Client) -> None:
    names = run("docs/user/neurons.md", embedded_server.address, client=client)
    assert names["overlap"].common == 1


def test_the_example_of_retries_runs() -> None:
    names = run("docs/operating.md", "localhost:50051")
    assert isinstance(names["client"], Client)
    names["client"].close()


@pytest.mark.parametrize(
    "example", [block for page in PAGES for block in blocks(page)], ids=lambda block: block.splitlines()[0]
)
def test_an_example_calls_what_there_is_with_options_that_it_takes(example: str) -> None:
    tree = ast.parse(example)
    known: dict[str, object] = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("patchclamp"):
            module = importlib.import_module(node.module or "")
            known.update({alias.name: getattr(module, alias.name) for alias in node.names})
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
        taken = inspect.signature(called).parameters  # type: ignore[arg-type]
        assert {keyword.arg for keyword in node.keywords if keyword.arg} <= set(taken), name
