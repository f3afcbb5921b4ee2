"""A corpus as lines of JSON, in UTF-8, one document a line:

    {"text": "...", "label": "..."}        the label is optional

Lines are read one at a time. One that is anything else is refused with its number, from 1; so are other keys, which a
misspelt label would be.
"""

import io
import json
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

from patchclamp_server.artifacts.corpora import MAX_DOCUMENT_BYTES, MAX_LABEL_CHARACTERS, CorpusBuilder, StoredCorpus
from patchclamp_server.artifacts.formats.base import ALONE, Beside, CannotExpress, Decoded, MalformedFile
from patchclamp_server.artifacts.formats.json_object import without_duplicates
from patchclamp_server.artifacts.types import Artifact, ArtifactKind
from patchclamp_server.model.info import ModelInfo

# What a document and a label take where every byte is written as \u and four digits.
MAX_LINE_BYTES = 6 * (MAX_DOCUMENT_BYTES + 4 * MAX_LABEL_CHARACTERS) + 100


def decode(source: bytes | Path, beside: Beside = ALONE) -> Decoded:
    """The tensors of a corpus, with the names of its labels. MalformedFile names the line that is wrong."""
    builder = CorpusBuilder()
    with io.BytesIO(source) if isinstance(source, bytes) else source.open("rb") as file:
        for number, line in enumerate(_lines(file), 1):
            try:
                builder.add(*_document(line))
            except (ValueError, RecursionError) as error:
                raise MalformedFile(f"line {number}: {error}") from error
    if not len(builder):
        raise MalformedFile("no line; a corpus has at least one document")
    provenance = {"method": "imported", "format": "text_json_lines", **builder.provenance()}
    return Decoded(builder.tensors(), provenance=provenance)


def encode(artifact: Artifact, model: ModelInfo | None = None) -> bytes:
    """All documents, each with its label where it has one."""
    if artifact.info.kind is not ArtifactKind.CORPUS:
        raise CannotExpress(f"lines of JSON hold a corpus, not a {artifact.info.kind.value}")
    corpus, lines = StoredCorpus(artifact), bytearray()
    for document in corpus:
        named = {"label": corpus.labels[document.label]} if document.label >= 0 else {}
        lines += json.dumps({"text": document.text, **named}, ensure_ascii=False).encode() + b"\n"
    return bytes(lines)


def _lines(file: IO[bytes]) -> Iterator[bytes]:
    while line := file.readline(MAX_LINE_BYTES + 1):
        yield line


def _document(line: bytes) -> tuple[str, str | None]:
    if len(line) > MAX_LINE_BYTES:
        raise ValueError(f"more than {MAX_LINE_BYTES} bytes")
    fields: Any = json.loads(line, object_pairs_hook=without_duplicates)
    if not isinstance(fields, dict) or not isinstance(fields.get("text"), str):
        raise ValueError('expected an object {"text": "...", "label": "..."}, the label optional')
    if others := sorted(fields.keys() - {"text", "label"}):
        raise ValueError(f"unknown key {others[0]!r:.80}; a document has text and label")
    label = fields.get("label")
    if label is not None and not isinstance(label, str):
        raise ValueError(f"the label {label!r:.80} is not text")
    return fields["text"], label
