"""The audit log as a file."""

import json
from pathlib import Path

import pytest

from patchclamp_server.security.audit import AuditLog
from patchclamp_server.security.configuration import ConfigurationError


class Lost:
    def __init__(self) -> None:
        self.lines = 0

    def __call__(self) -> None:
        self.lines += 1


def lines(path: Path) -> list[object]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_every_line_is_there_when_the_log_is_closed(tmp_path: Path):
    log = AuditLog(tmp_path / "audit.jsonl", Lost())
    for n in range(500):
        log.write({"n": n})
    log.close()
    assert lines(tmp_path / "audit.jsonl") == [{"n": n} for n in range(500)]


def test_lines_are_added_to_a_file_that_is_there(tmp_path: Path):
    path = tmp_path / "audit.jsonl"
    path.write_text('{"n":0}\n')
    log = AuditLog(path, Lost())
    log.write({"n": 1})
    log.close()
    assert lines(path) == [{"n": 0}, {"n": 1}]


def test_only_the_owner_can_read_it(tmp_path: Path):
    AuditLog(tmp_path / "audit.jsonl", Lost()).close()
    assert (tmp_path / "audit.jsonl").stat().st_mode & 0o777 == 0o600


def test_a_renamed_file_is_left_alone_and_a_new_one_begun(tmp_path: Path):
    path, rotated = tmp_path / "audit.jsonl", tmp_path / "audit.jsonl.1"
    log = AuditLog(path, Lost())
    log.write({"n": 0})
    while not path.read_text():
        pass
    path.rename(rotated)
    log.write({"n": 1})
    log.close()
    assert (lines(rotated), lines(path)) == ([{"n": 0}], [{"n": 1}])


def test_a_name_cannot_begin_a_line_of_its_own(tmp_path: Path):
    log = AuditLog(tmp_path / "audit.jsonl", Lost())
    log.write({"edit": 'x"}\n{"tenant":"other"'})
    log.close()
    assert len(lines(tmp_path / "audit.jsonl")) == 1


def test_a_full_disk_costs_lines_which_are_counted_and_nothing_else(caplog: pytest.LogCaptureFixture):
    lost = Lost()
    log = AuditLog(Path("/dev/full"), lost)
    log.write({"n": 0})
    log.write({"n": 1})
    log.close()
    assert lost.lines == 2
    assert caplog.text.count("lines of the audit log are lost") == 1


def test_a_place_that_cannot_be_written_is_an_error_at_the_start(tmp_path: Path):
    (tmp_path / "file").touch()
    with pytest.raises(ConfigurationError, match="cannot write the audit log"):
        AuditLog(tmp_path / "file" / "audit.jsonl", Lost())
