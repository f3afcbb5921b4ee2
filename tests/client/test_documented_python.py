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
from live import LiveServer
from live_front import LiveFront
from small_autoencoder import SmallAutoencoder
from tiny_llama import save_tiny_llama

from patchclamp import Client
from patchclamp_server.model.load import load_model

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
PAIRS = ROOT / "benchmarks/data/concepts/joyful_sad.jsonl"
# file-formats.md has a test of its own, which looks at what it stores (test_file_formats_guide.py).
ELSEWHERE = {"docs/user/file-formats.md"}


def blocks(page: Path) -> list[str]:
    return re.findall(r"^```python\n(.*?)^```", page.read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE)


def run(name: str, address: str, here: str = "localhost:50051", **given: object) -> dict[str, Any]:
    """The names that the blocks of a page leave behind; `given` are those that it takes from its reader.

    `address` takes the place of `here`.
    """
    names: dict[str, Any] = {"__name__": "example", **given}
    for block in blocks(ROOT / name):
        exec(block.replace(here, address), names)
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
        "docs/user/activations.md",
        "docs/user/concept-circuits.md",
        "docs/user/extraction.md",
        "docs/user/features.md",
        "docs/user/heads.md",
        "docs/user/http.md",
        "docs/user/monitoring.md",
        "docs/user/neurons.md",
        "docs/user/patching.md",
        "docs/user/probes.md",
        "docs/user/python.md",
        "docs/user/sparse.md",
        "docs/user/steering.md",
        "docs/user/subspaces.md",
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


def test_the_examples_of_http_run(embedded_server: LiveServer, capsys: pytest.CaptureFixture[str]) -> None:
    with LiveFront(embedded_server.address) as front:
        names = run("docs/user/http.md", front.url.removeprefix("http://"), here="localhost:8000")
    assert names["said"]["finished"]["receipt"]["touched"]
    assert "patchclamp.program.edits[0].layers[0] INVALID_FIELD" in capsys.readouterr().out


def test_the_sweep_of_the_guide_to_steering_runs(
    embedded_server: LiveServer, client: Client, capsys: pytest.CaptureFixture[str]
) -> None:
    names = run("docs/user/steering.md", embedded_server.address)
    rows = [line.split() for line in capsys.readouterr().out.splitlines()]
    # Layer, strength, effect, that of a random vector, ratio of perplexities.
    assert [len(row) for row in rows[:20]] == [5] * 20
    # The arms of the calibration.
    assert [row[0] for row in rows[20:]] == ["unsteered", "prompt", *["vector"] * 3, *["random"] * 3]
    assert names["knee"][0] == 12
    assert names["best"].auroc is not None
    client.delete_artifact(names["result"].artifact.id)


def test_the_examples_of_finding_vectors_run(embedded_server: LiveServer) -> None:
    names = run("docs/user/extraction.md", embedded_server.address)
    assert min(layer.heldout_accuracy for layer in names["discriminant"].layers) > 0.8
    assert names["told"].loss < names["told"].unedited_loss


def test_the_circuit_of_a_concept_of_the_guide_is_found(embedded_server: LiveServer) -> None:
    found = run("docs/user/concept-circuits.md", embedded_server.address)["found"]
    assert found.separation > 0
    assert found.both_zeroed.separation < found.both_zeroed.random_separation


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
            names = run("docs/user/monitoring.md", embedded_server.address, client=client, **given)
        assert names["batch"].activations
        assert names["report"].tokens == 1
        read = {name: sum(v.name == name for v in names["result"].prompt_readouts) for name in ("state", "attention")}
        assert read == {"state": 1, "attention": 30}
    finally:
        client.stop_watch("safety")
        client.delete_artifact("safety")


def test_the_example_of_retrieval_heads_runs(embedded_server: LiveServer, client: Client) -> None:
    given = {"page": "The key is under the old stone. ", "question": "Where is the key?"}
    answer = run("docs/user/heads.md", embedded_server.address, client=client, **given)["answer"]
    assert answer.grounding is not None
    client.delete_artifact("retrieval")


def test_the_examples_of_neurons_run(embedded_server: LiveServer, client: Client) -> None:
    names = run("docs/user/neurons.md", embedded_server.address, client=client)
    assert names["overlap"].common == 1


def test_the_examples_of_patching_run(embedded_server: LiveServer, client: Client) -> None:
    names = run("docs/user/patching.md", embedded_server.address, client=client)
    assert names["grid"].effects("resid_pre")[0][0] > 0.99
    assert [edit.rows + edit.rows_from_cache for edit in names["result"].receipt.edits] == [10, 1, 1]
    client.delete_artifact("france")


def test_the_examples_of_activations_run(embedded_server: LiveServer, client: Client) -> None:
    names = run("docs/user/activations.md", embedded_server.address, client=client)
    assert [len(value.values) for value in names["result"].prompt_readouts] == [576]
    client.delete_artifact("rows")


def test_the_examples_of_probes_run(embedded_server: LiveServer, client: Client) -> None:
    names = run("docs/user/probes.md", embedded_server.address, client=client)
    assert names["report"].brier < names["report"].brier_base_rate
    assert names["answer"].receipt.edits[0].gate_threshold == 0.5
    client.delete_artifact("mood")


def test_the_examples_of_subspaces_run(
    embedded_server: LiveServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    names = run("docs/user/subspaces.md", embedded_server.address)
    assert [layer.layer for layer in names["found"].layers] == [4, 10]
    assert names["layer"].steps == 4
    assert next((tmp_path / "back").iterdir()).name == "intkey_layer.12.comp.block_output.unit.pos.nunit.1#0.bin"
    names["client"].close()


def test_the_examples_of_features_run(
    embedded_server: LiveServer,
    client: Client,
    small_autoencoder: SmallAutoencoder,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    small_autoencoder.save_saelens(tmp_path / "layer_14")
    names = run("docs/user/features.md", embedded_server.address, client=client)
    assert len(names["found"].features) == 5
    assert names["result"].receipt.edits[0].rows == 7
    assert {value.name for value in names["result"].readouts} == {"0", "largest"}
    for tag in ("topics", "sae", "sae-names"):
        client.delete_artifact(tag)
    assert {file.name for file in (tmp_path / "back").iterdir()} == {"cfg.json", "sae_weights.safetensors"}


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
