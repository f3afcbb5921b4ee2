"""Texts and facts of the commands on neurons.

--texts [LABEL=]FILE  a text a line; without a label, the name of the file is it
--corpus TAG          a stored corpus
--data NAME           a data set of this package (patchclamp.datasets)
facts                 lines of {"prompt": ..., "answer": ...}; in a file that ends in .tsv, a prompt, a tab, its answer
"""

import argparse
from pathlib import Path
from typing import NamedTuple

from patchclamp import datasets
from patchclamp.cli.files import json_lines, not_empty, parsed_file, text_of
from patchclamp.cli.parser import count, seed
from patchclamp.neurons import Fact, TextSource


class Named(NamedTuple):
    """Is a file with the label or name that it was given."""

    name: str
    path: str


def named_file(text: str) -> Named:
    """Reads [NAME=]FILE. The name is by default that of the file, without its suffix."""
    name, equals, path = text.rpartition("=")
    if not path or (equals and not name):
        raise argparse.ArgumentTypeError(f"{text!r}: expected FILE or NAME=FILE, such as french=fr.txt")
    return Named(name or Path(path).stem, path)


def add_text_arguments(parser: argparse.ArgumentParser, *, required: bool = True) -> None:
    """Adds what a command takes that runs texts; `texts_of` reads it."""
    add_text_sources(parser.add_mutually_exclusive_group(required=required))
    add_window_arguments(parser)


def add_text_sources(source: "argparse._MutuallyExclusiveGroup") -> None:
    """Adds where texts come from to a group of alternatives."""
    source.add_argument(
        "--texts",
        type=labelled_file,
        action="append",
        metavar="[LABEL=]FILE",
        help="a text a line; its label is by default the name of the file; repeatable",
    )
    source.add_argument("--corpus", metavar="CORPUS", help="instead: id or tag of a stored corpus")
    source.add_argument("--data", choices=datasets.names(), help="instead: a data set of this package, with its labels")


def add_window_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--window-tokens", type=count, default=0, metavar="N", help="longer texts are cut (default: 512)"
    )
    parser.add_argument("--max-tokens", type=seed, default=0, metavar="N", help="until so many are run (default: all)")


def texts_of(args: argparse.Namespace) -> TextSource:
    """Returns the texts by label; files of one label are joined. ValueError where there are none."""
    if args.corpus is not None:
        return TextSource(args.corpus, args.window_tokens, args.max_tokens)
    if args.data is not None:
        return TextSource(datasets.load(args.data).texts, args.window_tokens, args.max_tokens)
    if args.texts is None:
        raise ValueError("give --texts [LABEL=]FILE, --corpus CORPUS or --data NAME")
    groups: dict[str, list[str]] = {}
    for label, texts in args.texts:
        groups.setdefault(label, []).extend(texts)
    return TextSource(groups, args.window_tokens, args.max_tokens)


def labelled_file(text: str) -> tuple[str, list[str]]:
    label, path = named_file(text)
    return label, line_file(path)


def line_file(path: str) -> list[str]:
    """Returns the lines that are not blank."""
    return [line for line in parsed_file(path, not_empty).splitlines() if line.strip()]


def facts_file(path: str) -> list[Fact]:
    if Path(path).suffix == ".tsv":
        return [_row(line, f"{path}:{number}") for number, line in _numbered(path)]
    expected = '{"prompt": ..., "answer": ...}, each a text, and perhaps "candidates": [...]'
    return json_lines(path, _fact, expected)


def _numbered(path: str) -> list[tuple[int, str]]:
    lines = enumerate(parsed_file(path, not_empty).splitlines(), start=1)
    return [(number, line) for number, line in lines if line.strip()]


def _row(line: str, place: str) -> Fact:
    prompt, *answers = line.split("\t")
    if not prompt or not all(answers) or not answers:
        raise argparse.ArgumentTypeError(f"{place}: expected a prompt, a tab and its answer; candidates may follow")
    return Fact(prompt, answers[0], answers[1:])


def _fact(line: dict[str, object]) -> Fact:
    candidates = line.get("candidates", [])
    if not isinstance(candidates, list) or not all(isinstance(each, str) for each in candidates):
        raise ValueError("candidates is no list of texts")
    return Fact(text_of(line, "prompt"), text_of(line, "answer"), candidates)
