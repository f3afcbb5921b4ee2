"""Progress in the terminal."""

import io
from contextlib import redirect_stderr

import pytest

from patchclamp.cli.terminal import ProgressBar
from patchclamp.results import Progress


class Terminal(io.StringIO):
    """A stream that says it is one."""

    def isatty(self) -> bool:
        return True


def shown(*events: object) -> str:
    with redirect_stderr(Terminal()) as terminal:
        bar = ProgressBar()
        for event in events:
            bar.show(event)
        bar.close()
        bar.close()
    return terminal.getvalue()


def test_a_stage_redraws_its_line_and_another_starts_a_new_one() -> None:
    text = shown(Progress("needles", 1, 2), "a run", Progress("needles", 2, 2), Progress("scores", 0, 0))
    needles, scores, end = text.split("\n")
    assert needles == f"\rneedles      [{'#' * 12:<24}] 1/2\rneedles      [{'#' * 24}] 2/2"
    assert scores.startswith("\rscores ")
    assert end == ""


def test_what_follows_a_job_that_ended_early_has_a_line_of_its_own() -> None:
    assert shown(Progress("needles", 1, 2)).count("\n") == 1


def test_a_job_without_progress_prints_nothing() -> None:
    assert shown("a run") == ""


def test_progress_is_silent_where_there_is_no_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    bar = ProgressBar()
    bar.show(Progress("needles", 1, 2))
    bar.close()
    assert capsys.readouterr().err == ""
