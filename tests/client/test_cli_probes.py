"""What `patchclamp probes train` prints, stores and draws, on a real server; what builders make of arguments."""

import json
from pathlib import Path
from typing import Any

import pytest
from live import LiveServer

from patchclamp import monitoring, programs
from patchclamp.cli import main
from patchclamp.cli.probes.train import reliability_lines
from patchclamp.cli.watch.item_spec import probe
from patchclamp.pictures.probes import reliability_figure
from patchclamp.results import ProbeReport, ReliabilityBin
from patchclamp.v1 import program_pb2 as pb

BINS = (ReliabilityBin(0.0, 0.1, 4, 0.05, 0.0), ReliabilityBin(0.9, 1.0, 6, 0.95, 1.0))
REPORT = ProbeReport(10, 0.9, 0.5, 0.05, 0.06, 0.25, 0.99, BINS, 0.0, 0.4, 0.4, 0.01)


@pytest.fixture(autouse=True)
def files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, live_server: LiveServer) -> None:
    (tmp_path / "rain.txt").write_text("".join(f"It rained in town {i}\n" for i in range(8)))
    (tmp_path / "key.txt").write_text("".join(f"The key {i} is of glass\n" for i in range(8)))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PATCHCLAMP_ADDRESS", live_server.address)


TRAIN = ("probes", "train", "rainy", "--texts", "rain.txt", "--texts", "key.txt", "--replace", "--target", "rain")


def test_a_report_is_a_table_beside_what_it_is_worth_and_the_probe_is_stored(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert main([*TRAIN, "--layers", "0,1", "--method", "prototype", "--pooling", "mean"]) == 0
    out, err = capsys.readouterr()
    for told in (
        "probability of rain (labels: ",
        "accuracy",
        "always the most frequent label",
        "Brier score",
        "code length ratio",
        "p 0.",
    ):
        assert told in out
    assert "stored as rainy = sha256:" in err
    assert "warning: the report is of" in err


def test_json_is_the_whole_result_and_the_picture_a_file(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    assert main([*TRAIN, "--json", "--picture", "reliability.png"]) == 0
    result: dict[str, Any] = json.loads(capsys.readouterr().out)
    assert (result["labels"], [each["layer"] for each in result["by_layer"]]) == (["rain", "key"], [0, 1])
    assert result["artifact"]["kind"] == "probe"
    assert (tmp_path / "reliability.png").read_bytes()[:4] == b"\x89PNG"


def test_a_training_that_was_detached_is_followed_to_its_result(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*TRAIN, "--layers", "1", "--detach"]) == 0
    job = capsys.readouterr().out.strip()
    assert main(["jobs", "follow", job, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["layers"] == [1]


def test_the_reliability_curve_has_a_point_for_each_bin() -> None:
    pytest.importorskip("matplotlib")
    curve, counts = reliability_figure(REPORT, "p").axes
    assert curve.lines[1].get_xydata().tolist() == [[0.05, 0.0], [0.95, 1.0]]
    assert [bar.get_height() for bar in counts.patches] == [4, 6]
    with pytest.raises(ValueError, match="no probability"):
        reliability_figure(ProbeReport(**{**REPORT.to_dict(), "reliability": ()}), "ridge")


def test_lines_of_reliability_mark_where_a_bar_should_end() -> None:
    low, high = reliability_lines(BINS)
    assert low.endswith("0.00 of 4 at 0.05")
    assert high.count("█") == 31
    assert high.index("|") == low.index("p") + len("p 0.9-1.0 ") + 30


def test_builders_name_the_probe_and_nothing_of_where_it_is() -> None:
    gate = programs.when_probe("p", below=0.3, latched=True)
    assert (gate.latched, gate.condition.probe, gate.condition.threshold) == (True, "p", 0.3)
    assert (gate.condition.comparison, gate.condition.site) == (pb.COMPARISON_BELOW, pb.SITE_UNSPECIFIED)
    aborted = programs.abort_when_probe("p", name="a", scope="generated")
    assert (aborted.condition.comparison, aborted.condition.threshold) == (pb.COMPARISON_ABOVE, 0.0)
    read = programs.read_probe("p", all_classes=True, name="r")
    assert (read.probe.probe, read.probe.all_classes, read.name, list(read.layers)) == ("p", True, "r", [])
    with pytest.raises(ValueError, match="one of above and below"):
        programs.when_probe("p", above=0.1, below=0.2)
    item = monitoring.watch_probe("n", "p", threshold="p95")
    assert (item.probe.probe, item.threshold_quantile) == ("p", 0.95)
    assert probe("mood=sad:.8") == monitoring.watch_probe("mood", "sad", threshold=0.8)
