"""Every command of the documentation is one that the real parsers take."""

import argparse
import re
import shlex
from collections.abc import Iterator
from pathlib import Path

import pytest

from patchclamp.cli import serving
from patchclamp.cli.app import build_parser
from patchclamp.cli.parser import Parser

ROOT = Path(__file__).parents[2]
DOCUMENTS = [
    ROOT / "README.md",
    ROOT / "deploy/README.md",
    ROOT / "deploy/helm/patchclamp/templates/NOTES.txt",
    ROOT / "examples/README.md",
    *sorted((ROOT / "docs").rglob("*.md")),
]
# What stands before a command in a line of the documents: variables, and the container that it runs in, whose program
# is patchclamp itself.
BEFORE = re.compile(
    r"^\s*(?:[A-Z_]+=\S+ )*"
    r"(?:docker compose (?:exec |run (?:--[\w-]+ )*)(?=patchclamp ))?(?:patchclamp (?=patchclamp ))?"
)
# Words that stand for something else.
STANDS_FOR = {"KIND": "vector"}
# What the commands read.
FILES = {
    "prose.txt": "Some text.",
    "prompts.txt": "My day was",
    "continuations.txt": " a wonderful day.",
    "heldout.txt": "Other text.",
    "page.txt": "The key is here.",
    "poems.txt": "The sea is wide.",
    "news.txt": "The sea rose.",
    "calm.txt": "It was quiet.\n",
    "angry.txt": "It was loud.\n",
    "capital.txt": "The capital of France is\n",
    "currency.txt": "The currency of France is\n",
    "joyful.txt": "The soup was hot.",
    "unhappy.txt": "The soup was cold.",
    "antonyms.jsonl": '{"input": "hot", "output": "cold"}',
    "concepts.jsonl": '{"input": "frozen water", "output": "ice"}',
    "words.jsonl": '{"positive": "king", "negative": "queen"}',
    "facts.tsv": "The capital of France is\t Paris\n",
    "capitals.jsonl": '{"clean": "a", "corrupt": "b", "answer": "c", "other_answer": "d"}',
    "pairs.jsonl": '{"clean": "a", "corrupt": "b", "clean_answer": "c", "corrupt_answer": "d"}',
    "days.jsonl": '{"value": "Monday", "prompts": ["On Monday"]}',
    "exchanges.jsonl": '{"base": "a", "source": "b", "answer": "c"}',
    "scenarios.jsonl": '{"joy": ["a"], "fear": ["b"]}',
    "results.json": (ROOT / "benchmarks/results/sparse_quality.json").read_text(encoding="utf-8"),
}


@pytest.fixture(autouse=True)
def _files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The directory in which the documents are."""
    (tmp_path / "benchmarks").symlink_to(ROOT / "benchmarks")
    for name, content in FILES.items():
        (tmp_path / name).write_text(content)
    monkeypatch.chdir(tmp_path)


def blocks(text: str) -> Iterator[str]:
    """Fenced blocks of a shell, and the indented lines of a text that is no Markdown."""
    for language, block in re.findall(r"^```(\w*)\n(.*?)^```", text, re.DOTALL | re.MULTILINE):
        if language in ("", "sh", "bash", "console"):
            yield block


def commands(document: Path) -> list[str]:
    """Lines of blocks that call patchclamp, without what stands before; continued lines are one."""
    text = document.read_text(encoding="utf-8")
    if document.suffix != ".md":
        # A template of the chart.
        text = f"```\n{re.sub(r'{{ (?:if|end).*?}}', '', text).replace('{{ .Values.service.port }}', '50051')}\n```"
    lines = "\n".join(blocks(text)).replace("\\\n", " ").splitlines()
    found = []
    for line in lines:
        command = BEFORE.sub("", line)
        inner = re.search(r"\$\((patchclamp [^)]*)\)", line)
        if inner:
            command = inner[1]
        if command.startswith("patchclamp "):
            found.append(command)
    return found


def mentions(document: Path) -> list[str]:
    """What sentences name in backticks: `patchclamp watch stats NAME`."""
    prose = re.sub(r"^```.*?^```", "", document.read_text(encoding="utf-8"), flags=re.DOTALL | re.MULTILINE)
    return re.findall(r"`(patchclamp [a-z][^`]*)`", prose)


def parse(command: str) -> argparse.Namespace:
    """The arguments of a command. SystemExit where it is none."""
    # A shell takes # within a word as it is, and what follows it at the start of one as a comment.
    _, *words = shlex.split(re.sub(r" > \S+|\s#.*", "", command))
    arguments = [STANDS_FOR.get(word, word) for word in words]
    if arguments[0] in serving.COMMANDS:
        parser = Parser(prog=f"patchclamp {arguments[0]}")
        serving.add_arguments(arguments[0], parser)
        return parser.parse_args(arguments[1:])
    return build_parser().parse_args(arguments)


def of_all(find: object) -> list[object]:
    return [
        pytest.param(command, id=f"{document.relative_to(ROOT)}: {command[:60]}")
        for document in DOCUMENTS
        for command in find(document)  # type: ignore[operator]
    ]


def test_the_documents_have_commands() -> None:
    """Nothing is checked where nothing is found."""
    assert len(of_all(commands)) > 60
    assert len(commands(ROOT / "deploy/README.md")) >= 4
    assert len(mentions(ROOT / "deploy/README.md")) >= 3


@pytest.mark.parametrize("command", of_all(commands))
def test_a_command_of_a_block_is_complete(command: str) -> None:
    assert vars(parse(command))


@pytest.mark.parametrize("command", of_all(mentions))
def test_a_command_that_a_sentence_names_exists(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    """It may leave out arguments, but not which action of a group is meant."""
    try:
        parse(command)
    except SystemExit as end:
        said = capsys.readouterr().err
        required = re.search(r"the following arguments are required: (.*);", said)
        if end.code != 0 and (required is None or "action" in required[1].lower()):
            pytest.fail(said)
