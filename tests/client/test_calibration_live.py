"""Calibration and detection from the clients and the command line, against a whole server of a tiny random llama."""

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from live import LiveServer

from patchclamp import AsyncClient, Client, effects
from patchclamp.cli import main
from patchclamp.pictures.steering import calibration_figure, detection_figure
from patchclamp.programs import add
from patchclamp.results import CalibrationResult, ConceptDetection, DetectedText, DosePoint
from patchclamp_server.artifacts.store import ArtifactStore
from patchclamp_server.artifacts.types import ArtifactKind
from patchclamp_server.model.load import load_model
from patchclamp_server.model.sites import Site

PAIRS = [(f"good day {i}", f"bad night {i}") for i in range(8)]
TEXTS = {"glad": [good for good, _ in PAIRS], "sad": [bad for _, bad in PAIRS]}
PROMPTS = ["It was", "She has"]


@pytest.fixture(scope="module")
def server(tiny_llama_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[LiveServer]:
    with LiveServer(load_model(str(tiny_llama_dir)), tmp_path_factory.mktemp("artifacts")) as live:
        with Client(live.address) as client:
            client.extract_vectors(PAIRS, pooling="mean", tags=["glad"]).result()
            client.train_probe(TEXTS, target="glad", layers=[1], pooling="mean", tags=["glad-probe"]).result()
        put_autoencoder(live)
        yield live


def put_autoencoder(live: LiveServer) -> None:
    """At layer 1, as "sae"."""
    width, generator = live.model.info.d_model, torch.Generator().manual_seed(4)
    tensors = {name: torch.randn(6, width, generator=generator) for name in ("encoder", "decoder")}
    tensors |= {"encoder_bias": torch.zeros(6), "decoder_bias": torch.zeros(width)}
    ArtifactStore(live.server.config.artifacts_url).put(
        ArtifactKind.AUTOENCODER,
        tensors,
        model_fingerprint=live.model.info.fingerprint,
        site=Site.RESID_POST,
        provenance={"layer": 1, "function": "relu", "subtracted": "nothing"},
        tags=["sae"],
    )


@pytest.fixture
def client(server: LiveServer) -> Iterator[Client]:
    with Client(server.address) as client:
        yield client


def test_a_vector_is_calibrated_and_warned_of_in_the_next_call(client: Client):
    events: list[object] = []
    result = client.calibrate_vector(
        "glad",
        PROMPTS,
        effect=effects.words("a"),
        layers=[1],
        strengths=[0.25, 0.5],
        instruction="Be glad.",
        random_vectors=1,
        max_tokens=4,
        max_perplexity_ratio=1e9,
        max_repetition=1.0,
        tags=["known"],
        replace_tags=True,
    ).result(events.append)
    assert [each for each in events if isinstance(each, DosePoint)] == list(result.points)
    assert [point.strength for point in result.curve("vector", 1)] == [0.25, 0.5]
    assert result.baseline("prompt") is not None
    [safe] = result.safe
    assert (safe.layer, safe.low, safe.high) == (1, 0.0, 0.5)
    for strength, codes in ((0.5, []), (0.6, ["beyond_safe_range"])):
        told = client.score("a", "b", program=[add("known", layers=1, strength=strength)]).receipt.warnings
        assert [w.code for w in told if w.code == "beyond_safe_range"] == codes
    effect_axes = calibration_figure(result, "glad").axes[0]
    assert effect_axes.get_xlabel() == "strength"
    legend = [text.get_text() for text in effect_axes.get_legend().get_texts()]
    assert legend == ["layer 1", "unsteered", "prompt", "random vectors", "knee"]


def test_texts_are_scored_as_they_run_and_then_reported(client: Client):
    events: list[object] = []
    result = client.detect_concept("glad", TEXTS, "glad", poolings=["mean", "max"]).result(events.append)
    texts = [each for each in events if isinstance(each, DetectedText)]
    assert [each.label for each in texts] == ["glad"] * 8 + ["sad"] * 8
    assert {len(each.scores) for each in texts} == {len(result.detectors)} == {4}
    assert [(r.layer, r.pooling) for r in result.detectors] == [(0, "mean"), (0, "max"), (1, "mean"), (1, "max")]
    best = result.detectors[result.best]
    assert best.auroc is not None
    assert best.auroc.mean == max(r.auroc.mean for r in result.detectors if r.auroc)
    assert best.feature is None
    assert len(detection_figure(result, "glad").axes[0].get_lines()) >= 4


def test_texts_without_a_target_have_no_reports(client: Client):
    result = client.detect_concept(["glad"], ["one", "two"], layers=[1]).result()
    assert [r.auroc for r in result.detectors] == [None] * 3


def test_probes_and_features_are_detectors_too(client: Client):
    result = client.detect_concept("glad-probe", TEXTS, "glad", features={"sae": [5, 0]}, poolings=["mean"]).result()
    assert [(r.name, r.feature, r.layer) for r in result.detectors] == [
        ("glad-probe", None, 1),
        ("sae feature 5", 5, 1),
        ("sae feature 0", 0, 1),
    ]
    assert len(list(result.curves())) == 3
    names = [line.get_label() for line in detection_figure(result, "glad").axes[0].get_lines()]
    assert "sae feature 5, mean" in names
    alone = client.detect_concept([], TEXTS, "glad", features={"sae": 5}, poolings=["mean"]).result()
    assert alone.detectors == result.detectors[1:2]


def test_the_effect_is_read_by_a_probe(client: Client):
    effect = effects.probe("glad-probe")
    found = client.calibrate_vector(
        "glad", PROMPTS, effect=effect, layers=[1], strengths=[0.5], random_vectors=1, max_tokens=3
    ).result()
    assert all(0.0 < point.effect.mean < 1.0 for point in found.points)


async def test_the_async_client_does_the_same(server: LiveServer):
    async with AsyncClient(server.address) as client:
        detection = await client.detect_concept("glad", TEXTS, "glad", layers=[1]).result()
        assert isinstance(detection, ConceptDetection)
        stream = client.calibrate_vector("glad", PROMPTS, layers=[1], strengths=[0.5], random_vectors=1, max_tokens=2)
        assert (await stream.result()).layer == 1


def test_what_is_no_request_is_refused_before_it_is_sent(client: Client):
    with pytest.raises(ValueError, match="prompts: give at least one"):
        client.calibrate_vector("glad", [])
    with pytest.raises(TypeError, match="effect: expected what a function of"):
        client.calibrate_vector("glad", PROMPTS, effect="words")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="application 'subtract' is unknown"):
        client.calibrate_vector("glad", PROMPTS, application="subtract")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="detectors: give the id or tag"):
        client.detect_concept([], TEXTS)


@pytest.fixture
def files(server: LiveServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATCHCLAMP_ADDRESS", server.address)
    monkeypatch.chdir(tmp_path)
    Path("prompts.txt").write_text("\n".join(PROMPTS))
    for label, texts in TEXTS.items():
        Path(f"{label}.txt").write_text("\n".join(texts))


CALIBRATE = ["vectors", "calibrate", "glad", "--prompts", "prompts.txt", "--layers", "1", "--strengths", "0.5", "1"]
SMALL = ["--random-vectors", "1", "--tokens", "3"]


@pytest.mark.usefixtures("files")
def test_the_command_line_calibrates(capsys: pytest.CaptureFixture[str]):
    options = ["--words", "a", "--instruction", "Be glad.", "--name", "dosed", "--replace", "--picture", "dose.png"]
    assert main([*CALIBRATE, *SMALL, *options]) == 0
    told = capsys.readouterr()
    for word in ("unsteered", "prompt", "vector", "random", "perplexity (95 %)"):
        assert word in told.out
    assert "stored as dosed = sha256:" in told.err
    assert "knee: layer" in told.err
    assert Path("dose.png").stat().st_size > 0
    classifier = ["--label", "glad", "--texts", "glad.txt", "--texts", "sad.txt"]
    assert main([*CALIBRATE, *SMALL, "--probe", "glad-probe", "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert result["artifact"]["evidence"]["calibration"]["add"]["effect"]["measure"] == "probe"
    assert main([*CALIBRATE, *SMALL, *classifier, "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert len(result["points"]) == 5
    assert result["artifact"]["evidence"]["calibration"]["add"]["effect"]["measure"] == "classifier"


@pytest.mark.usefixtures("files")
def test_one_effect_is_measured(capsys: pytest.CaptureFixture[str]):
    assert main([*CALIBRATE, "--words", "a", "--target-texts", "prompts.txt"]) == 2
    assert "expected one effect, got --words, --target-texts" in capsys.readouterr().err


@pytest.mark.usefixtures("files")
def test_the_command_line_detects(capsys: pytest.CaptureFixture[str]):
    detect = ["vectors", "detect", "glad", "--target", "glad", "--texts", "glad.txt", "--texts", "sad.txt"]
    assert main([*detect, "--layers", "1", "--picture", "auroc.png"]) == 0
    told = capsys.readouterr()
    assert "AUROC (95 %)" in told.out
    assert "16 texts" in told.err
    assert Path("auroc.png").stat().st_size > 0
    assert main([*detect, "--poolings", "mean", "--json"]) == 0
    assert [r["pooling"] for r in json.loads(capsys.readouterr().out)["detectors"]] == ["mean", "mean"]
    assert main(["vectors", "detect", "glad", "--texts", "glad.txt", "--picture", "auroc.png"]) == 2
    assert main([*detect[:2], "--features", "sae:5,0", "--features", "sae:2", "--texts", "glad.txt", "--json"]) == 0
    reports = json.loads(capsys.readouterr().out)["detectors"]
    assert [r["feature"] for r in reports] == [5, 5, 5, 0, 0, 0, 2, 2, 2]
    with pytest.raises(SystemExit):
        main([*detect[:2], "--features", "sae", "--texts", "glad.txt"])


@pytest.mark.usefixtures("files")
def test_both_go_on_as_jobs_without_their_terminal(client: Client, capsys: pytest.CaptureFixture[str]):
    assert main([*CALIBRATE, *SMALL, "--detach"]) == 0
    job = capsys.readouterr().out.strip()
    followed = client.follow_job(job).result()
    assert isinstance(followed, CalibrationResult)
    assert main(["jobs", "follow", job]) == 0
    assert followed.artifact.id in capsys.readouterr().out
    assert main(["vectors", "detect", "glad", "--texts", "glad.txt", "--detach"]) == 0
    assert isinstance(client.follow_job(capsys.readouterr().out.strip()).result(), ConceptDetection)
