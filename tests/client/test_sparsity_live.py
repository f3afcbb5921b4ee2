"""Sparse inference from both clients and the command line, against a whole server of a tiny random llama."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from live import LiveServer

from patchclamp import AsyncClient, Client, PatchclampError
from patchclamp.cli import main
from patchclamp.results import Progress
from patchclamp.sparsity import QualityGuard, Sparsity, cats, dense, fovea, griffin, oracle, static_set, wina
from patchclamp_server.model.load import load_model

# One byte is one token.
TEXTS = [f"{i} green bottles are hanging on the wall, and if one should fall, {i - 1} are left. " * 6 for i in range(4)]
CALIBRATION: dict[str, Any] = {"document_tokens": 64, "text_description": "bottles"}
SHORT: dict[str, Any] = {"max_tokens": 8, "ignore_eos": True}


@pytest.fixture(scope="module")
def server(tiny_llama_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[LiveServer]:
    """One of its own, with a profile of static_set in its store."""
    with LiveServer(load_model(str(tiny_llama_dir)), tmp_path_factory.mktemp("sparse_artifacts")) as live:
        with Client(live.address) as client:
            client.calibrate_profile(static_set(keep_ratio=0.5), TEXTS, **CALIBRATION, tags=["half"]).result()
        yield live


@pytest.fixture
def client(server: LiveServer) -> Iterator[Client]:
    with Client(server.address) as client:
        yield client


@pytest.fixture
def text(tmp_path: Path) -> str:
    file = tmp_path / "bottles.txt"
    file.write_text("\n".join(TEXTS))
    return str(file)


def test_a_sparse_request_reports_what_was_computed(client: Client):
    result = client.generate("hello", sparsity=cats(keep_ratio=0.25), **SHORT).result()
    report = result.sparsity
    assert report is not None
    assert (report.policy, report.profile, report.guard) == ("cats", "", None)
    # The last of eight generated tokens does not pass through the model.
    assert (report.sparse_tokens, report.dense_tokens) == (7, 0)
    assert report.active_ratio == pytest.approx(0.25)


@pytest.mark.parametrize("policy", [dense(), cats(keep_ratio=1.0), griffin(keep_ratio=1.0), wina(keep_ratio=1.0)])
def test_what_keeps_everything_writes_the_dense_text(client: Client, policy: Any):
    sparse = client.generate("hello", sparsity=policy, logprobs=0, **SHORT).result()
    plain = client.generate("hello", logprobs=0, **SHORT).result()
    assert [(t.id, t.logprob) for t in sparse.tokens] == [(t.id, t.logprob) for t in plain.tokens]


def test_a_profile_is_used_by_its_tag_with_its_own_policy(client: Client):
    report = client.generate("hello", sparsity="half", **SHORT).result().sparsity
    assert report is not None
    assert report.policy == "static_set"
    assert report.profile == client.get_artifact("half").id
    assert report.active_ratio == pytest.approx(0.5)


def test_a_request_may_ask_another_ratio_of_a_profile(client: Client):
    sparsity = Sparsity("half", static_set(keep_ratio=0.25))
    report = client.generate("hello", sparsity=sparsity, **SHORT).result().sparsity
    assert report is not None
    assert report.active_ratio == pytest.approx(0.25)


def test_a_guard_that_allows_nothing_falls_back_and_says_where(client: Client):
    guard = QualityGuard(sample_rate=1.0, max_divergence=1e-12, window=2)
    result = client.generate("hello", sparsity=Sparsity(policy=cats(keep_ratio=0.0), guard=guard), **SHORT).result()
    report = result.sparsity
    assert report is not None
    assert report.guard is not None
    assert report.guard.dense_from is not None
    assert report.dense_tokens > 0
    assert "FELL BACK" in str(report)


def test_a_guard_that_allows_everything_only_counts(client: Client):
    guard = QualityGuard(sample_rate=1.0, max_divergence=1000.0, window=2)
    report = client.generate("hello", sparsity=Sparsity(policy=cats(), guard=guard), **SHORT).result().sparsity
    assert report is not None
    assert report.guard is not None
    assert (report.guard.sampled_tokens, report.guard.dense_from) == (7, None)


def test_score_session_and_compare_report_too(client: Client):
    scored = client.score("hello", " you", sparsity=cats())
    with client.session("hello", sparsity=cats(), **SHORT) as session:
        spoken = session.result()
    compared = client.compare("hello", sparsity=cats(keep_ratio=0.1), **SHORT).result()
    for report in (scored.sparsity, spoken.sparsity, compared.edited.sparsity):
        assert report is not None
        assert report.sparse_tokens > 0
    assert compared.baseline.sparsity is None
    assert compared.summary.mean_kl > 0


@pytest.mark.parametrize(
    ("sparsity", "code", "field"),
    [
        ("nothing", "NOT_FOUND", "sparsity.profile"),
        (fovea(), "INVALID_ARGUMENT", "sparsity.profile"),
        (Sparsity("half", cats()), "FAILED_PRECONDITION", "sparsity.profile"),
        (cats(keep_ratio=1.5), "INVALID_ARGUMENT", "sparsity.policy.keep_ratio"),
        (oracle(), "INVALID_ARGUMENT", "sparsity.policy.oracle"),
        (Sparsity(policy=cats(), guard=QualityGuard()), "INVALID_ARGUMENT", "sparsity.guard.max_divergence"),
    ],
)
def test_a_refusal_names_the_field(client: Client, sparsity: Any, code: str, field: str):
    with pytest.raises(PatchclampError) as refused:
        client.generate("hello", sparsity=sparsity).result()
    assert (refused.value.code, refused.value.violations[0].field) == (code, field)


def test_calibration_stores_a_profile_with_its_card(client: Client):
    events: list[object] = []
    stream = client.calibrate_profile(fovea(keep_ratio=0.5), TEXTS, **CALIBRATION, tags=["mine"])
    result = stream.result(events.append)
    assert {event.stage for event in events if isinstance(event, Progress)} >= {"calibration"}
    assert (result.artifact.kind, result.artifact.tags) == ("sparsity_profile", ("mine",))
    assert 0 < result.quality.sparsity < 1
    assert result.quality.divergence < result.random_control.divergence
    assert client.get_artifact("mine").evidence
    assert client.generate("hello", sparsity="mine", **SHORT).result().sparsity is not None


def test_evaluations_come_in_order_with_controls_and_speed(client: Client):
    sparsities = [dense(), cats(keep_ratio=0.25), Sparsity("half"), oracle(keep_ratio=0.25)]
    found = client.evaluate_profile(sparsities, TEXTS, measure_speed=True, document_tokens=64).result()
    assert [each.policy for each in found] == ["dense", "cats", "static_set", "oracle"]
    assert found[0].quality.perplexity_ratio == pytest.approx(1.0)
    assert found[1].quality.sparsity == pytest.approx(0.75)
    assert found[1].random_control.sparsity == pytest.approx(0.75)
    assert all(each.speed is not None and each.speed.speedup > 0 for each in found)


def test_core_neurons_of_equal_prompts_are_equal(client: Client):
    found = client.predict_core_neurons(["hello", "hello", "quite another"], griffin(keep_ratio=0.25), layers=[1])
    assert [list(layers) for layers in found.prompts] == [[1], [1], [1]]
    assert len(found.prompts[0][1]) == 16
    overlaps = {(each.first, each.second): each.mean_jaccard for each in found.overlaps}
    assert overlaps[0, 1] == 1.0
    assert overlaps[0, 2] == overlaps[1, 2] < 1.0


async def test_the_async_client_does_the_same(server: LiveServer):
    async with AsyncClient(server.address) as client:
        generated = await client.generate("hello", sparsity="half", **SHORT).result()
        calibrated = await client.calibrate_profile(static_set(), TEXTS, document_tokens=64).result()
        evaluated = await client.evaluate_profile(["half"], TEXTS, document_tokens=64).result()
        core = await client.predict_core_neurons(["hello"], "half")
    assert calibrated.artifact.kind == "sparsity_profile"
    assert generated.sparsity is not None
    assert evaluated[0].policy == "static_set"
    assert sorted(core.prompts[0]) == [0, 1]


def test_the_command_line_calibrates_evaluates_and_generates(
    server: LiveServer, text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    pytest.importorskip("matplotlib")
    monkeypatch.setenv("PATCHCLAMP_ADDRESS", server.address)
    texts = ["--text", text, "--document-tokens", "64"]
    assert main(["sparsity", "calibrate", "cli", "--policy", "static_set:keep_ratio=.5", *texts]) == 0
    assert "random set" in capsys.readouterr().out
    specs = ["cats", "static_set:profile=cli", "--keep", ".5", ".25"]
    assert main(["sparsity", "evaluate", *specs, *texts, "--json"]) == 0
    evaluations = capsys.readouterr().out
    assert [each["keep_ratio"] for each in json.loads(evaluations)] == [0.5, 0.25, 0.5, 0.25]
    results, picture = tmp_path / "results.json", tmp_path / "quality.png"
    results.write_text(evaluations)
    assert main(["sparsity", "plot", str(results), str(picture)]) == 0
    assert picture.exists()
    assert main(["sparsity", "core", "hello", "hallo", "--sparsity", "cli"]) == 0
    assert "mean overlap" in capsys.readouterr().out
    assert main(["generate", "hello", "--max-tokens", "4", "--ignore-eos", "--sparsity", "cli"]) == 0
    assert "sparsity static_set" in capsys.readouterr().err
    assert main(["generate", "hello", "--sparsity", "nothing"]) == 1
    assert "sparsity.profile" in capsys.readouterr().err
