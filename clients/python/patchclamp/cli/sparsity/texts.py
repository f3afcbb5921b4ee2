"""Text files that policies are calibrated or measured on."""

import argparse
from pathlib import Path
from typing import NamedTuple

from patchclamp.cli.files import text_file
from patchclamp.cli.options import add_model_argument
from patchclamp.cli.parser import count
from patchclamp.requests import EvaluateOptions


class TextFile(NamedTuple):
    name: str
    text: str


def add_text_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--text", type=_named, nargs="+", required=True, metavar="FILE", help="plain text; long ones are cut up"
    )
    parser.add_argument("--document-tokens", type=count, metavar="N", help="tokens of a document they are cut into")
    add_model_argument(parser)


def texts_of(args: argparse.Namespace) -> list[str]:
    files: list[TextFile] = args.text
    return [file.text for file in files]


def text_options(args: argparse.Namespace) -> EvaluateOptions:
    """Returns what was given; the names of the files are the description of the text."""
    files: list[TextFile] = args.text
    options: EvaluateOptions = {"text_description": ", ".join(file.name for file in files), "model": args.model}
    if args.document_tokens is not None:
        options["document_tokens"] = args.document_tokens
    return options


def _named(path: str) -> TextFile:
    return TextFile(Path(path).name, text_file(path))
