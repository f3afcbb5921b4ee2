"""Every line that says how to install Patchclamp works: it is on no index, and has the extras of pyproject.toml."""

import re
import tomllib
from pathlib import Path

ROOT = Path(__file__).parents[2]
FOLDERS = ("clients", "server", "kernels", "deploy", "docs", "examples", "benchmarks")
SUFFIXES = {".md", ".py", ".txt", ".ts", ".ipynb", ".yaml", ".yml", ".tpl", ".sh", ""}


def install_lines() -> list[str]:
    """What stands after `pip install`, to the end of its line."""
    files = [ROOT / "README.md", ROOT / "Makefile", ROOT / "CHANGELOG.md", ROOT / "CONTRIBUTING.md"]
    for folder in FOLDERS:
        files += [path for path in (ROOT / folder).rglob("*") if path.is_file() and path.suffix in SUFFIXES]
    texts = (path.read_text(encoding="utf-8") for path in files if "node_modules" not in path.parts)
    return [line for text in texts for line in re.findall(r"pip install (.*)", text)]


def test_nothing_is_installed_from_an_index_that_does_not_have_it() -> None:
    assert len(install_lines()) > 5
    assert [line for line in install_lines() if re.match(r"['\"]?patchclamp", line)] == []


def test_every_extra_that_is_named_is_one_of_the_package() -> None:
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["optional-dependencies"]
    named = [
        name for line in install_lines() for group in re.findall(r"\.\[([\w,]+)\]", line) for name in group.split(",")
    ]
    assert named
    assert set(named) <= set(extras)


def test_messages_name_extras_of_the_package() -> None:
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["optional-dependencies"]
    sources = [path for folder in ("clients", "server") for path in (ROOT / folder).rglob("*.py")]
    named = {
        name for path in sources for name in re.findall(r"install_line\('(\w+)'\)", path.read_text(encoding="utf-8"))
    }
    assert {"completion", "otel", "plot", "server"} <= named <= set(extras)
