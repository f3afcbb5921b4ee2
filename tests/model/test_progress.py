import io

from rich.console import Console

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


def test_a_terminal_gets_a_bar_for_each_stage_and_a_finished_stage_is_full() -> None:
    last_frame = shown(terminal=True).rsplit("download", 1)[1]
    assert "verify" in last_frame
    assert last_frame.count("100%") == 2
