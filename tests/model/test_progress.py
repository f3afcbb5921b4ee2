import argparse
import io
from pathlib import Path

import pytest
from rich.console import Console

from patchclamp_server.cli.commands import pull
from patchclamp_server.model.progress import RichProgress, Stage


def shown(*, terminal: bool) -> str:
    output = io.StringIO()
    with RichProgress(Console(file=output, force_terminal=terminal, width=100)) as progress:
        for done in range(4):
            progress.update(Stage.DOWNLOAD, done, 3)
        progress.update(Stage.VERIFY, 1, 2)
        progress.update(Stage.READY)
    return output.getvalue()


def test_a_log_gets_one_line_for_each_stage() -> None:
    assert shown(terminal=False).split("\n") == ["model: download", "model: verify", "model: ready", ""]


def test_a_long_stage_says_its_share_at_intervals_where_there_is_no_terminal() -> None:
    output, now = io.StringIO(), [0.0]
    with RichProgress(Console(file=output, width=100), clock=lambda: now[0]) as progress:
        for done in range(300):  # a tensor a second, for five minutes
            progress.update(Stage.CONVERT, done, 300)
            now[0] += 1.0
        progress.update(Stage.DOWNLOAD)
        now[0] += 60.0
        progress.update(Stage.DOWNLOAD, 5)  # nobody knows of how many
    lines = output.getvalue().splitlines()
    assert lines[:4] == ["model: convert", "model: convert 3%", "model: convert 7%", "model: convert 10%"]
    assert lines[-2:] == ["model: convert 97%", "model: download"]
    assert len(lines) == 31


@pytest.mark.usefixtures("own_cache")
def test_a_start_says_ready_once_and_last(tiny_gguf: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert pull(argparse.Namespace(model=str(tiny_gguf), json=False)) == 0
    said = capsys.readouterr().err.splitlines()
    stages = ["tokenizer", "fingerprint", "prepare", "ready"]
    assert said == [f"model: {stage}" for stage in stages]


def test_a_terminal_gets_a_bar_for_each_stage_and_a_finished_stage_is_full() -> None:
    last_frame = shown(terminal=True).rsplit("download", 1)[1]
    assert "verify" in last_frame
    assert last_frame.count("100%") == 2
