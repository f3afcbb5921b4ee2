"""Files that are read again when they change."""

import os
from pathlib import Path

import pytest
from prometheus_client import CollectorRegistry

from patchclamp_server.security.configuration import ConfigurationError
from patchclamp_server.security.metrics import SecurityMetrics
from patchclamp_server.security.watched_file import WatchedFile, read_text


class Watch:
    """A watched file of text, which is broken when it says so."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.registry = CollectorRegistry()
        self.file = WatchedFile("policy", (path,), self._read, SecurityMetrics(self.registry).config_reloads)

    def _read(self) -> str:
        text = read_text(self.path)
        if text == "broken":
            raise ConfigurationError("broken")
        return text

    def count(self, outcome: str) -> float | None:
        labels = {"file": "policy", "outcome": outcome}
        return self.registry.get_sample_value("patchclamp_config_reloads_total", labels)


@pytest.fixture
def watch(tmp_path: Path) -> Watch:
    (tmp_path / "policy").write_text("one")
    return Watch(tmp_path / "policy")


def test_a_file_that_did_not_change_is_not_read_again(watch: Watch):
    assert not watch.file.poll()
    assert (watch.file.value, watch.count("ok"), watch.count("failed")) == ("one", 0, 0)


def test_a_change_is_read_once(watch: Watch):
    watch.path.write_text("three")
    assert watch.file.poll()
    assert not watch.file.poll()
    assert (watch.file.value, watch.count("ok")) == ("three", 1)


def test_a_broken_file_keeps_what_was_read_before_and_counts_once(watch: Watch, caplog: pytest.LogCaptureFixture):
    watch.path.write_text("broken")
    assert not watch.file.poll()
    assert not watch.file.poll()
    assert (watch.file.value, watch.count("failed")) == ("one", 1)
    assert "policy changed and cannot be used" in caplog.text


def test_a_file_that_vanished_keeps_what_was_read_before(watch: Watch):
    watch.path.unlink()
    assert not watch.file.poll()
    assert (watch.file.value, watch.count("failed")) == ("one", 1)


def test_a_repaired_file_is_in_force(watch: Watch):
    watch.path.write_text("broken")
    watch.file.poll()
    watch.path.write_text("four")
    assert watch.file.poll()
    assert watch.file.value == "four"


def test_a_symbolic_link_that_moves_is_a_change(tmp_path: Path):
    """As Kubernetes replaces a mounted secret."""
    for name in ("old", "new"):
        (tmp_path / name).write_text(name)
        os.utime(tmp_path / name, (0, 0))
    link = tmp_path / "data"
    link.symlink_to("old")
    watch = Watch(link)
    (tmp_path / "next").symlink_to("new")
    (tmp_path / "next").replace(link)
    assert watch.file.poll()
    assert watch.file.value == "new"


def test_there_is_nothing_to_keep_at_the_start(tmp_path: Path):
    with pytest.raises(ConfigurationError, match=r"cannot read .*: No such file"):
        Watch(tmp_path / "missing")
