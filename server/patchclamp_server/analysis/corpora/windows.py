"""Windows of tokens of the documents of a corpus.

    window = special tokens before a text + the next (window_tokens - their number) tokens of the document

so each is what a prompt of that text would be. The last of a document has what is left; no window crosses from one
document to the next. The number of a window, which reducers know it by, tells where it stands:

    number = document · 2^32 + the first of its tokens in the document
"""

from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from patchclamp_server.analysis.digests import json_digest
from patchclamp_server.artifacts.corpora import MAX_DOCUMENT_BYTES, UNLABELLED, Document
from patchclamp_server.errors import InvalidArgument
from patchclamp_server.text.prompt import PromptEncoder

DEFAULT_WINDOW_TOKENS = 512
_SHIFT = 32


class Corpus(Protocol):
    """StoredCorpus of artifacts/corpora.py, or a ListedCorpus. `digest` names the documents and their order; `labels`
    are the names of the labels, `document_labels` int64 [documents] the label of each."""

    digest: str
    labels: tuple[str, ...]
    document_labels: NDArray[np.int64]

    def __len__(self) -> int: ...
    def document(self, index: int) -> Document: ...


class ListedCorpus:
    """Documents that came with a request, as texts or as token ids."""

    def __init__(self, documents: Sequence[Document], labels: tuple[str, ...] = ()) -> None:
        for i, document in enumerate(documents):
            if not UNLABELLED <= document.label < len(labels):
                message = f"the label {document.label} is none of {len(labels)}, nor {UNLABELLED} for none"
                raise InvalidArgument(f"documents[{i}].label", message)
        self._documents, self.labels = documents, labels
        self.document_labels = np.array([document.label for document in documents], dtype=np.int64)
        self.digest = json_digest([[[d.text, d.label] for d in documents], labels])

    def __len__(self) -> int:
        return len(self._documents)

    def document(self, index: int) -> Document:
        return self._documents[index]


@dataclass(frozen=True)
class Window:
    """`tokens` with the special ones in front; `start`: the first of the others in the document."""

    document: int
    start: int
    tokens: tuple[int, ...]
    label: int
    is_last: bool

    @property
    def is_left_over(self) -> bool:
        """Whether it is one token, which others of the document came before: as the first of its window it is an
        attention sink, and says nothing of the text."""
        return self.start > 0 and len(self.tokens) == 1

    @property
    def number(self) -> int:
        return (self.document << _SHIFT) + self.start


@dataclass(frozen=True)
class Cut:
    """Between two windows: all before `start` of `document` are done, none after."""

    document: int = 0
    start: int = 0

    @classmethod
    def behind(cls, window: Window, body: int) -> "Cut":
        """`body`: tokens of a document in a window."""
        return cls(window.document + 1) if window.is_last else cls(window.document, window.start + body)


START = Cut()


def place_of(number: int) -> tuple[int, int]:
    """The document and the first token of the window of a number."""
    return number >> _SHIFT, number & ((1 << _SHIFT) - 1)


def body_tokens(encoder: PromptEncoder, window_tokens: int) -> int:
    """Tokens of a document in a window. InvalidArgument: there is no room for one."""
    special = len(encoder.text_start)
    if window_tokens <= special:
        raise InvalidArgument("window_tokens", f"{window_tokens} tokens, of which special tokens take {special}")
    return window_tokens - special


async def windows(
    corpus: Corpus, encoder: PromptEncoder, window_tokens: int, after: Cut = START
) -> AsyncGenerator[Window, None]:
    """Those behind a cut, in order. One document at a time is read, in a thread of the analysis texts.

    Raises InvalidArgument on "documents[i]" or "documents[i].ids" where one has a token that the model lacks.
    """
    body = body_tokens(encoder, window_tokens)
    for index in range(after.document, len(corpus)):
        document = corpus.document(index)
        ids = await ids_of(document, encoder, index)
        first = after.start if index == after.document else 0
        for start in range(first, len(ids), body):
            tokens = (*encoder.text_start, *ids[start : start + body])
            yield Window(index, start, tokens, document.label, start + body >= len(ids))


async def window_at(corpus: Corpus, encoder: PromptEncoder, window_tokens: int, number: int) -> Window:
    """The window of a number that a reducer kept: position p of the reducer is `tokens[p]`."""
    async with aclosing(windows(corpus, encoder, window_tokens, Cut(*place_of(number)))) as found:
        return await anext(found)


async def ids_of(document: Document, encoder: PromptEncoder, index: int) -> tuple[int, ...]:
    """The tokens of a document, without special ones; raises as `windows` does."""
    field = f"documents[{index}]"
    if not isinstance(document.text, str):
        encoder.check_ids(document.text, f"{field}.ids")
        return document.text
    # A token has a byte at least.
    most = MAX_DOCUMENT_BYTES
    return await encoder.analysis.run(encoder.encode_body, document.text, field, most_tokens=most)
