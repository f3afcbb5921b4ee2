"""Pictures, read back through the objects of matplotlib; and the same as text, which needs nothing."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from canned_neurons import point

from patchclamp.cli.heads.drawing import heat_map_lines, needle_grid_lines
from patchclamp.pictures.heads import heat_map_figure, needle_grid_figure
from patchclamp.pictures.neurons import census_figure, dose_response_figure, layer_scores_figure
from patchclamp.pictures.quality import QualityPoint, quality_figure, series_of
from patchclamp.results import LayerCensus, NeedleGrid, NeuronEditEffect
from patchclamp.v1 import neuron_pb2

MATRIX = ((0.0, 0.25, 0.0), (0.0, 0.0, 0.75))
GRID = NeedleGrid((256, 512), (0.1, 0.9), (((1, 2), None), ((0, 1), (3, 3))))
TABLE = {
    "dense": {"1": {"perplexity_ratio": 1.0, "bytes_read_16": 1.0}},
    "fovea": {
        "0.3": {"perplexity_ratio": 1.05, "bytes_read_16": 0.497},
        "0.5": {"perplexity_ratio": 1.02, "bytes_read_16": 0.682},
    },
    "random": {"0.5": {"perplexity_ratio": 99.4, "bytes_read_16": 0.5}},
}


def evaluation(policy: str, keep: float, ratio: float, spec: str = "", speedup: float | None = None) -> dict[str, Any]:
    return {
        "spec": spec or policy,
        "policy": policy,
        "keep_ratio": keep,
        "quality": {"perplexity_ratio": ratio, "bytes_read_16": keep},
        "random_control": {"perplexity_ratio": 50.0, "bytes_read_16": keep},
        "speed": None if speedup is None else {"speedup": speedup},
    }


@pytest.fixture
def matplotlib() -> Any:
    return pytest.importorskip("matplotlib")


def is_png(file: Path) -> bool:
    return file.read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"


def test_results_of_the_benchmark_are_points_by_policy_with_falling_ratio() -> None:
    series = series_of(json.dumps({"documents": 16, "table": TABLE}))
    assert list(series) == ["dense", "fovea", "random"]
    assert series["fovea"] == [QualityPoint(0.5, 1.02, 0.682, None), QualityPoint(0.3, 1.05, 0.497, None)]


def test_evaluations_bring_their_random_control_once_for_each_ratio() -> None:
    evaluations = [evaluation("cats", 0.5, 1.3), evaluation("fovea", 0.5, 1.02), evaluation("cats", 0.3, 3.1)]
    series = series_of(json.dumps(evaluations))
    assert [point.keep for point in series["random"]] == [0.5, 0.3]
    assert [point.perplexity_ratio for point in series["cats"]] == [1.3, 3.1]


def test_variants_of_a_policy_are_lines_of_their_own() -> None:
    evaluations = [
        evaluation("fovea", 0.5, 1.02, "fovea:keep_ratio=.5,profile=mine"),
        evaluation("fovea", 0.5, 1.2, "fovea:keep_ratio=.5,bits=2,profile=mine"),
        evaluation("fovea", 0.3, 1.05, "mine"),
    ]
    assert list(series_of(json.dumps(evaluations))) == ["fovea", "random", "fovea:bits=2"]


@pytest.mark.parametrize(
    "text", ["{", "[]", "{}", '{"table": {}}', '[{"policy": "cats"}]', '{"table": {"cats": 1}}', "3"]
)
def test_what_holds_no_results_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match=r"\w"):
        series_of(text)


def test_quality_is_drawn_on_a_log_scale_against_bytes_read(matplotlib: Any, tmp_path: Path) -> None:
    figure = quality_figure(series_of(json.dumps({"table": TABLE})))
    [axes] = figure.axes
    assert (axes.get_yscale(), axes.get_xscale()) == ("log", "linear")
    assert "bytes" in axes.get_xlabel()
    lines = {line.get_label(): line for line in axes.get_lines()}
    assert list(lines["fovea"].get_xdata()) == [0.682, 0.497]
    assert list(lines["fovea"].get_ydata()) == [1.02, 1.05]
    assert lines["random"].get_color() == "grey"
    assert [text.get_text() for text in axes.get_legend().get_texts()] == ["dense", "fovea", "random"]
    figure.savefig(tmp_path / "quality.png")
    assert is_png(tmp_path / "quality.png")


def test_measured_speed_gets_axes_of_its_own(matplotlib: Any) -> None:
    evaluations = [evaluation("cats", 0.5, 1.3, speedup=1.5), evaluation("fovea", 0.5, 1.02)]
    _, speed = quality_figure(series_of(json.dumps(evaluations))).axes
    drawn = {line.get_label(): list(line.get_xdata()) for line in speed.get_lines()}
    assert drawn["cats"] == [1.5]
    assert not {"fovea", "random"} & set(drawn)


def test_a_heat_map_has_a_row_for_each_layer_and_a_column_for_each_head(matplotlib: Any, tmp_path: Path) -> None:
    figure = heat_map_figure(MATRIX, "induction")
    axes, _ = figure.axes
    [image] = axes.get_images()
    assert image.get_array().tolist() == [list(row) for row in MATRIX]
    assert (image.origin, image.get_clim()) == ("lower", (0.0, 0.75))
    assert (axes.get_xlabel(), axes.get_ylabel(), axes.get_title()) == ("head", "layer", "induction")
    figure.savefig(tmp_path / "heads.png")
    assert is_png(tmp_path / "heads.png")


def test_colours_of_signed_scores_part_at_zero(matplotlib: Any) -> None:
    axes, _ = heat_map_figure(((-0.5, 0.25), (0.0, 0.0)), "effect").axes
    assert axes.get_images()[0].get_clim() == (-0.5, 0.5)


def test_a_needle_grid_shows_the_share_found_and_the_counts(matplotlib: Any, tmp_path: Path) -> None:
    figure = needle_grid_figure(GRID, "needles found")
    axes, _ = figure.axes
    [image] = axes.get_images()
    shares = image.get_array()
    assert (shares[0, 0], shares[1, 0], shares[1, 1]) == (0.5, 0.0, 1.0)
    assert bool(shares.mask[0, 1])
    assert image.get_clim() == (0.0, 1.0)
    assert [label.get_text() for label in axes.get_xticklabels()] == ["256", "512"]
    assert [label.get_text() for label in axes.get_yticklabels()] == ["0.10", "0.90"]
    assert sorted(text.get_text() for text in axes.texts) == ["0/1", "1/2", "3/3"]
    figure.savefig(tmp_path / "grid.png")
    assert is_png(tmp_path / "grid.png")


def test_scores_of_layers_are_bars_with_the_mean_as_a_line(matplotlib: Any, tmp_path: Path) -> None:
    figure = layer_scores_figure([3, 5], [0.5, 0.875], [0.25, 0.5], "welch_t")
    [axes] = figure.axes
    assert [(bar.get_x() + bar.get_width() / 2, bar.get_height()) for bar in axes.patches] == [(3, 0.5), (5, 0.875)]
    assert list(axes.get_lines()[0].get_ydata()) == [0.25, 0.5]
    assert (axes.get_xlabel(), axes.get_title()) == ("layer", "welch_t")
    figure.savefig(tmp_path / "layers.png")
    assert is_png(tmp_path / "layers.png")
    assert not layer_scores_figure([3], [0.5], (), "dog").axes[0].get_lines()


def test_changes_by_fraction_have_the_band_of_the_random_sets(matplotlib: Any, tmp_path: Path) -> None:
    effect = neuron_pb2.NeuronEditEffect(points=[point(0.5, 1, -0.25), point(1.0, 2, -0.5)])
    figure = dose_response_figure(NeuronEditEffect.from_proto(effect), "zero capitals")
    accuracy, perplexity = figure.axes
    lines = {line.get_label(): line for line in accuracy.get_lines()}
    assert list(lines["the set"].get_xdata()) == [0.5, 1.0]
    assert list(lines["the set"].get_ydata()) == [-0.25, -0.5]
    band = accuracy.collections[0].get_paths()[0].vertices
    assert (band[:, 1].min(), band[:, 1].max()) == (-0.0625, 0.0)
    assert (accuracy.get_title(), accuracy.get_ylabel()) == ("capitals", "change of accuracy")
    assert perplexity.get_title() == "prose (side)"
    figure.savefig(tmp_path / "dose.png")
    assert is_png(tmp_path / "dose.png")


def test_classes_of_a_census_are_stacked(matplotlib: Any) -> None:
    layers = [LayerCensus(0, 8, 2, 1, 0, 0, 0, 0, 0.25), LayerCensus(1, 8, 1, 3, 0, 0, 0, 0, 0.125)]
    [axes] = census_figure(layers, "1,000 tokens").axes
    assert [(bar.get_y(), bar.get_height()) for bar in axes.patches] == [(0, 2), (0, 1), (2, 1), (1, 3)]
    assert [text.get_text() for text in axes.get_legend().get_texts()] == ["dead", "rare"]


def test_a_heat_map_in_text_shades_the_nearest_quarter_of_the_largest_score() -> None:
    lines = list(heat_map_lines(((0.1, 0.25, 0.5), (0.8, 0.9, 1.0))))
    assert lines[1:3] == ["L0 |  ░░▒▒|", "L1 |▓▓████|"]
    assert "░ 0.25  ▒ 0.5" in lines[3]


def test_a_heat_map_in_text_tells_scores_below_zero_apart() -> None:
    lines = list(heat_map_lines(((-1.0, 0.25), (-0.25, 0.0))))
    assert lines[1:3] == ["L0 |##░░|", "L1 |--  |"]
    assert "below zero" in lines[3]


def test_a_heat_map_in_text_without_any_score_is_blank() -> None:
    assert list(heat_map_lines(((0.0, 0.0),)))[1] == "L0 |    |"


def test_layers_of_many_heads_stay_on_a_line() -> None:
    assert len(list(heat_map_lines((tuple(range(64)),)))[1]) == len("L0 ||") + 64


def test_a_needle_grid_in_text_lines_up_its_columns() -> None:
    assert list(needle_grid_lines(GRID)) == ["depth  256  512  tokens", " 0.10  1/2    -", " 0.90  0/1  3/3"]


@pytest.mark.parametrize(
    "arguments",
    [
        ["sparsity", "plot", "results.json", "out.png"],
        ["heads", "detect", "retrieval", "--heatmap", "out.png"],
        ["heads", "detect", "retrieval", "--grid", "out.png"],
        ["neurons", "find", "dog", "--picture", "out.png"],
    ],
)
def test_a_picture_without_matplotlib_says_what_to_install_before_any_work(
    arguments: list[str], tmp_path: Path
) -> None:
    (tmp_path / "results.json").write_text(json.dumps({"table": TABLE}))
    code = (
        f"import sys\nsys.modules['matplotlib'] = None\nfrom patchclamp.cli import main\nsys.exit(main({arguments}))\n"
    )
    finished = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert finished.returncode == 2
    assert "pip install '.[plot]'" in finished.stderr
