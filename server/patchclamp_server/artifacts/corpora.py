"""A corpus: documents of text with or without a label, kept as bytes: none is a Python object before its turn.

    text    uint8 [bytes]        all documents one after the other, UTF-8
    ends    int64 [documents]    where each ends: document d is text[ends[d - 1] : ends[d]], the first from 0 on
    labels  int64 [documents]    optional: an index into the names of `provenance["labels"]`, or UNLABELLED

It is of no model: any model reads it with its own tokenizer.
"""

import codecs
from array import array
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from patchclamp_server.artifacts.types import Artifact, ArtifactKind
from patchclamp_server.errors import FailedPrecondition, InvalidArgument

UNLABELLED = -1
# A document is tokenised in one go. Longer texts are cut by whoever makes the corpus, who knows where.
MAX_DOCUMENT_BYTES = 1 << 20
MAX_LABELS = 1024
MAX_LABEL_CHARACTERS = 200
TENSORS = ("text", "ends", "labels")
_PIECE = 1 << 20


@dataclass(frozen=True)
class Document:
    """`text`: characters, or the token ids of a model. `label`: an index into the names of its corpus."""

    text: str | tuple[int, ...]
    label: int = UNLABELLED


class CorpusBuilder:
    """Gathers documents into the tensors of a corpus. Labels are numbered in the order in which they first come."""

    def __init__(self) -> None:
        self._text = bytearray()
        self._ends, self._labels = array("q"), array("q")
        self._names: dict[str, int] = {}

    def add(self, text: str, label: str | None = None) -> None:
        """Raises ValueError for what no corpus holds; nothing is added then."""
        try:
            data = text.encode()
        except UnicodeEncodeError as error:
            raise ValueError("text is not valid Unicode") from error
        if not 0 < len(data) <= MAX_DOCUMENT_BYTES:
            raise ValueError(f"a text of {len(data)} bytes; a document has 1 to {MAX_DOCUMENT_BYTES}")
        number = UNLABELLED if label is None else self._number(label)
        self._text += data
        self._ends.append(len(self._text))
        self._labels.append(number)

    def _number(self, label: str) -> int:
        if label not in self._names:
            check_label(label)
            if len(self._names) == MAX_LABELS:
                raise ValueError(f"the label {label!r:.80} is one more than the {MAX_LABELS} that a corpus has")
            self._names[label] = len(self._names)
        return self._names[label]

    def __len__(self) -> int:
        return len(self._ends)

    def tensors(self) -> dict[str, Tensor]:
        """Shared with the builder, which must not be added to any more. "labels" where one has a label."""
        found: dict[str, Tensor] = {
            "text": torch.from_numpy(np.frombuffer(self._text, dtype=np.uint8)),
            "ends": torch.from_numpy(np.frombuffer(self._ends, dtype=np.int64)),
        }
        if self._names:
            found["labels"] = torch.from_numpy(np.frombuffer(self._labels, dtype=np.int64))
        return found

    def provenance(self) -> dict[str, Any]:
        return {"labels": list(self._names)} if self._names else {}


class StoredCorpus:
    """Documents of a stored corpus, read one at a time. FailedPrecondition: another kind of artifact."""

    def __init__(self, artifact: Artifact) -> None:
        if artifact.info.kind is not ArtifactKind.CORPUS:
            raise FailedPrecondition("", f"{artifact.info.id} is a {artifact.info.kind.value}, not a corpus")
        # Names the documents and their order, for whoever resumes a job over them.
        self.digest = artifact.info.id
        self.labels = label_names(artifact.info.provenance)
        self._text, self._ends = artifact.tensors["text"].numpy(), artifact.tensors["ends"].numpy()
        own = artifact.tensors.get("labels")
        # int64 [documents], known without reading a document.
        self.document_labels = np.full(len(self), UNLABELLED, dtype=np.int64) if own is None else own.numpy()

    def __len__(self) -> int:
        return len(self._ends)

    def document(self, index: int) -> Document:
        start = int(self._ends[index - 1]) if index else 0
        text = self._text[start : int(self._ends[index])].tobytes().decode()
        return Document(text, int(self.document_labels[index]))

    def __iter__(self) -> Iterator[Document]:
        return map(self.document, range(len(self)))


def label_names(provenance: Mapping[str, Any]) -> tuple[str, ...]:
    return tuple(provenance.get("labels", ()))


def check_label(label: str) -> None:
    """Raises ValueError."""
    if not 1 <= len(label) <= MAX_LABEL_CHARACTERS:
        raise ValueError(f"a label of {len(label)} characters; it has 1 to {MAX_LABEL_CHARACTERS}")


def check_labels(provenance: Mapping[str, Any], tensors: Mapping[str, Tensor], tensor: str = "labels") -> None:
    """The names and the labels in a tensor fit each other. InvalidArgument on "provenance.labels"."""
    names = provenance.get("labels", [])
    if not isinstance(names, list) or len(names) > MAX_LABELS or not all(isinstance(name, str) for name in names):
        raise InvalidArgument("provenance.labels", f"the names of labels are a list of at most {MAX_LABELS} texts")
    try:
        for name in names:
            check_label(name)
    except ValueError as error:
        raise InvalidArgument("provenance.labels", str(error)) from error
    if len(set(names)) < len(names):
        raise InvalidArgument("provenance.labels", "two labels have one name")
    largest = int(tensors[tensor].max()) if tensor in tensors else UNLABELLED
    if largest >= len(names):
        raise InvalidArgument("provenance.labels", f"{tensor} holds {largest}; {len(names)} have a name")


def corpus_layers(shapes: Mapping[str, tuple[int, ...]]) -> tuple[int, ...]:
    """None. InvalidArgument: names and shapes that a corpus does not have."""
    for name in ("text", "ends"):
        if name not in shapes:
            raise InvalidArgument("tensors", f"a corpus needs {name}")
    for name, shape in shapes.items():
        if name not in TENSORS:
            raise InvalidArgument(
                "tensors", f"{name!r:.200} is not a tensor of a corpus; accepted: {', '.join(TENSORS)}"
            )
        if len(shape) != 1 or not shape[0]:
            raise InvalidArgument("tensors", f"{name} must be [n] with n >= 1, not {list(shape)}")
    if shapes.get("labels", shapes["ends"]) != shapes["ends"]:
        raise InvalidArgument("tensors", f"{shapes['labels'][0]} labels of {shapes['ends'][0]} documents")
    return ()


def check_corpus(tensors: Mapping[str, Tensor]) -> None:
    """Types, bounds of the documents, and that each is UTF-8. InvalidArgument names the document, from 0."""
    for name, dtype in (("text", torch.uint8), ("ends", torch.int64), ("labels", torch.int64)):
        if name in tensors and tensors[name].dtype != dtype:
            found = str(tensors[name].dtype).removeprefix("torch.")
            raise InvalidArgument("tensors", f"{name} must be {str(dtype).removeprefix('torch.')}, not {found}")
    text, ends = tensors["text"].numpy(), tensors["ends"].numpy()
    # Compared and not subtracted, which numbers near the ends of int64 would make wrong.
    starts = np.concatenate((np.zeros(1, dtype=np.int64), ends[:-1]))
    bad = np.flatnonzero((ends <= starts) | (ends > len(text)))
    if len(bad):
        raise InvalidArgument("tensors", f"ends: document {bad[0]} has no byte, or more than text has")
    if ends[-1] != len(text):
        raise InvalidArgument("tensors", f"ends: the last is {ends[-1]}, and text has {len(text)} bytes")
    long = np.flatnonzero(ends - starts > MAX_DOCUMENT_BYTES)
    if len(long):
        size = int(ends[long[0]] - starts[long[0]])
        raise InvalidArgument("tensors", f"document {long[0]} has {size} bytes; at most {MAX_DOCUMENT_BYTES}")
    _check_utf8(text, starts)
    if "labels" in tensors and bool((tensors["labels"] < UNLABELLED).any()):
        raise InvalidArgument("tensors", f"labels are from 0 on, or {UNLABELLED} for none")


def _check_utf8(text: np.ndarray, starts: np.ndarray) -> None:
    """By pieces: the text of all documents is not made at once."""
    # The second to fourth byte of a character.
    inside = np.flatnonzero((text[starts] & 0xC0) == 0x80)
    if len(inside):
        raise InvalidArgument("tensors", f"document {inside[0]} begins inside a character")
    decoder = codecs.getincrementaldecoder("utf-8")()
    for at in range(0, len(text), _PIECE):
        try:
            decoder.decode(text[at : at + _PIECE].tobytes(), final=at + _PIECE >= len(text))
        except UnicodeDecodeError as error:
            # A character that the piece before began is at most three bytes earlier.
            document = int(np.searchsorted(starts, max(at + error.start - 3, 0), side="right")) - 1
            raise InvalidArgument("tensors", f"text is not UTF-8 in or behind document {document}") from error
