"""Labelled documents in two parts: neurons are found by one part, and judged by the other.

    held out of n documents of a label:  round(fraction · n), and at least min(2, n / 2) on either side

Documents are dealt at random, and not their windows: no text is in both parts.
"""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from patchclamp_server.analysis.corpora.windows import Corpus
from patchclamp_server.analysis.digests import json_digest
from patchclamp_server.artifacts.corpora import UNLABELLED, Document


def held_out(document_labels: NDArray[np.int64], fraction: float, seed: int) -> NDArray[np.bool_]:
    """Returns which documents are held out, bool [documents], given the label of each. Those without one are not."""
    generator = np.random.default_rng(seed)
    found = np.zeros(len(document_labels), dtype=np.bool_)
    for label in np.unique(document_labels[document_labels != UNLABELLED]):
        places = np.flatnonzero(document_labels == label)
        least = min(2, len(places) // 2)
        n = min(max(least, round(fraction * len(places))), len(places) - least)
        found[generator.permutation(places)[:n]] = True
    return found


def of_documents_run(document_labels: NDArray[np.int64], run: Sequence[int]) -> NDArray[np.int64]:
    """Returns the labels of the documents as far as any is run, ascending in `run`: `max_tokens` may end them. Those in
    between that have no token, and so no window, are UNLABELLED: they are nothing to be held out."""
    labels = np.full(run[-1] + 1 if len(run) else 0, UNLABELLED, dtype=np.int64)
    labels[run] = document_labels[run]
    return labels


class Relabelled:
    """The documents of a corpus that have a label by `document_labels` int64 [documents], which stand for their own.

    The others are never read.
    """

    def __init__(self, corpus: Corpus, document_labels: NDArray[np.int64], labels: tuple[str, ...]) -> None:
        self._corpus, self.labels = corpus, labels
        self.documents = np.flatnonzero(document_labels != UNLABELLED)
        self.document_labels = document_labels[self.documents]
        self.digest = json_digest([corpus.digest, document_labels.tolist()])

    def __len__(self) -> int:
        return len(self.documents)

    def document(self, index: int) -> Document:
        text = self._corpus.document(int(self.documents[index])).text
        return Document(text, int(self.document_labels[index]))
