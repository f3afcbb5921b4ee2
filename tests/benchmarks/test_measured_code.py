"""Figures are shown only while the code that they measure is as it was."""

import importlib.util
import json
import sys
from pathlib import Path
from types import ModuleType

import pytest

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


def load(name: str) -> ModuleType:
    sys.path.insert(0, str(BENCHMARKS))
    try:
        spec = importlib.util.spec_from_file_location(name, BENCHMARKS / f"{name}.py")
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        return module
    finally:
        sys.path.remove(str(BENCHMARKS))


@pytest.fixture
def measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    module = load("measured_code")
    monkeypatch.setattr(module, "ROOT", tmp_path)
    monkeypatch.setitem(module.SOURCES, "ours", tmp_path)
    monkeypatch.setitem(module.MEASURED, "speed", ("ours.package", "ours.module"))
    (tmp_path / "ours" / "package").mkdir(parents=True)
    (tmp_path / "ours" / "package" / "a.py").write_text("x = 1\n")
    (tmp_path / "ours" / "module.py").write_text(
        '"""Words."""\nimport os\n\n\ndef f():\n    """More."""\n    return 1\n'
    )
    return module


@pytest.mark.parametrize("kind", load("measured_code").MEASURED)
def test_the_code_that_a_result_measures_is_there(kind: str) -> None:
    assert len(load("measured_code").code_digest(kind)) == 16


def test_every_kind_of_result_says_what_it_measures_and_how() -> None:
    readme = load("readme")
    assert readme.SECTIONS.keys() == readme.COMMANDS.keys() == load("measured_code").MEASURED.keys()
    assert readme.SUMMARIES.keys() <= readme.SECTIONS.keys()


@pytest.mark.parametrize(
    "text",
    [
        '"""Other words."""\n\nimport sys\nfrom a import b\n\n\ndef f():\n    # Why.\n    return 1\n',
        "def f():\n\n    return 1",
    ],
)
def test_words_imports_and_places_change_no_digest(measured: ModuleType, tmp_path: Path, text: str) -> None:
    before = measured.code_digest("speed")
    (tmp_path / "ours" / "module.py").write_text(text)
    (tmp_path / "ours" / "package" / "a.py").rename(tmp_path / "ours" / "package" / "b.py")
    assert measured.code_digest("speed") == before


def test_code_in_a_package_changes_the_digest(measured: ModuleType, tmp_path: Path) -> None:
    before = measured.code_digest("speed")
    (tmp_path / "ours" / "package" / "a.py").write_text("x = 2\n")
    assert measured.code_digest("speed") != before


def test_a_name_that_is_no_file_is_refused(measured: ModuleType, tmp_path: Path) -> None:
    (tmp_path / "ours" / "module.py").unlink()
    with pytest.raises(FileNotFoundError, match=r"ours\.module is neither a module nor a package"):
        measured.code_digest("speed")


def test_a_figure_whose_code_has_changed_is_taken_off_its_pages(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    readme = load("readme")
    page = tmp_path / "performance.md"
    page.write_text(f"{readme.BEGIN}\n{readme.END}\n")
    monkeypatch.setattr(readme, "RESULTS", tmp_path)
    monkeypatch.setattr(readme, "PAGES", {page: readme.performance})
    result = {
        "answered_calls": {"a": 3},
        "balance_of_two": 0.5,
        "code": readme.code_digest("rolling"),
        "commit": "abc1234",
        "date": "2026-11-29",
        "lost_calls": 0,
        "slowest_call_seconds": 1.0,
    }
    (tmp_path / "rolling.json").write_text(json.dumps(result))
    monkeypatch.setattr(sys, "argv", ["readme.py"])
    assert readme.main() == 0
    assert "0 of\n3 calls lost" in page.read_text()
    monkeypatch.setattr(sys, "argv", ["readme.py", "--check"])
    assert readme.main() == 0
    monkeypatch.setattr(readme, "code_digest", lambda kind: "other code")
    assert readme.main() == 1
    assert "performance.md is stale" in capsys.readouterr().err
    monkeypatch.setattr(sys, "argv", ["readme.py"])
    assert readme.main() == 0
    assert "calls lost" not in page.read_text()
    assert "- Rolling restarts (`python benchmarks/rolling.py`, last run on 2026-11-29" in page.read_text()
