"""Wrong uses of the command line, its version, and its completion in a shell."""

import subprocess
from importlib.metadata import version

import pytest

from patchclamp.cli import main


def misused(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    with pytest.raises(SystemExit) as ended:
        main(arguments)
    assert ended.value.code == 2
    return capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ("generate", "Hi", "--max-tokns", "3"),
            "patchclamp generate: error: unrecognized arguments: --max-tokns 3 (did you mean --max-tokens?); "
            "see patchclamp generate --help\n",
        ),
        (
            ("vectors", "put", "f.gguf", "--nmae=joy"),
            "patchclamp vectors put: error: unrecognized arguments: --nmae=joy (did you mean --name?); "
            "see patchclamp vectors put --help\n",
        ),
        (
            ("serve", "--modle", "x"),
            "patchclamp serve: error: unrecognized arguments: --modle x (did you mean --model?); "
            "see patchclamp serve --help\n",
        ),
        (
            ("generate", "Hi", "--top-k", "many"),
            "patchclamp generate: error: argument --top-k: expected a whole number from 0 to 2147483647, got 'many'; "
            "see patchclamp generate --help\n",
        ),
        (
            ("vectors",),
            "patchclamp vectors: error: the following arguments are required: ACTION; see patchclamp vectors --help\n",
        ),
    ],
)
def test_a_wrong_use_is_one_line_of_the_command_it_is_about(
    arguments: tuple[str, ...], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert misused(capsys, *arguments) == message


def test_an_option_is_not_abbreviated(capsys: pytest.CaptureFixture[str]) -> None:
    assert "did you mean --max-tokens?" in misused(capsys, "generate", "Hi", "--max-tok", "3")


def test_the_version_is_that_of_the_package(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["--version"])
    assert ended.value.code == 0
    assert capsys.readouterr().out == f"patchclamp {version('patchclamp')}\n"


def test_help_names_the_default_address_and_not_the_one_that_is_set(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("PATCHCLAMP_ADDRESS", "elsewhere:1")
    with pytest.raises(SystemExit):
        main(["models", "--help"])
    assert "PATCHCLAMP_ADDRESS, else localhost:50051)" in " ".join(capsys.readouterr().out.split())


@pytest.mark.parametrize("shell", ["bash", "zsh"])
def test_the_completion_of_a_shell_knows_the_options_of_every_command(
    shell: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["completion", shell]) == 0
    script = capsys.readouterr().out
    for option in ("--max-tokens", "--steer", "--drain-seconds", "--holdout-fraction"):
        assert option in script


def test_bash_completes_a_command(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["completion", "bash"]) == 0
    asked = """
COMP_WORDS=(patchclamp vec); COMP_CWORD=1
$(complete -p patchclamp | sed 's/.*-F \\([^ ]*\\).*/\\1/') patchclamp vec patchclamp
echo "${COMPREPLY[@]}"
"""
    run = subprocess.run(["bash"], input=capsys.readouterr().out + asked, capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "vectors"
