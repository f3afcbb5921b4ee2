"""Progress in the terminal."""

import io
from contextlib import redirect_stderr

import pytest

from patchclamp.cli.terminal import ProgressBar, styled
from patchclamp.results import Progress


@pytest.fixture(autouse=True)
def terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "xterm")


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


def lines(*events: object, quiet: bool = False) -> list[str]:
    """What a stream that is no terminal gets."""
    with redirect_stderr(io.StringIO()) as log:
        bar = ProgressBar(quiet=quiet)
        for event in events:
            bar.show(event)
        bar.close()
    return log.getvalue().splitlines()


def test_where_there_is_no_terminal_each_tenth_of_a_stage_is_a_line() -> None:
    shown = lines(*(Progress("statistics", done, 40) for done in range(41)), Progress("budgets", 0, 2))
    assert shown == [f"statistics {done}/40" for done in range(0, 41, 4)] + ["budgets 0/2"]


def test_output_for_programs_has_no_lines_of_progress() -> None:
    assert lines(Progress("statistics", 1, 2), quiet=True) == []


@pytest.mark.parametrize("term", ["dumb", ""])
def test_a_terminal_that_cannot_redraw_gets_lines_without_escapes(term: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", term)
    assert shown(Progress("needles", 1, 2)) == "needles 1/2\n"
    assert styled("text", "red", Terminal()) == "text"


def test_a_terminal_is_coloured_unless_it_says_no(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("NO_COLOR", raising=False)
    assert styled("text", "red", Terminal()) == "\033[31mtext\033[0m"
    monkeypatch.setenv("NO_COLOR", "1")
    assert styled("text", "red", Terminal()) == "text"
