"""Mean-centring: v = mean(h of the target texts) - mean(h of ordinary text).

All activations of a model have a common offset, which says nothing of the target; the mean of ordinary text is taken
for it. The negatives are pieces of ordinary text, as many as there are texts and each as long as one of them, so that
length tells nothing. Strength 1 moves the mean of ordinary text onto that of the target. Source: Jorgensen et al. 2023,
Improving Activation Steering in Language Models with Mean-Centring, §3.
"""

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray

from patchclamp_server.analysis.corpora.windows import Corpus
from patchclamp_server.analysis.digests import json_digest
from patchclamp_server.analysis.ordinary_text import ordinary_text
from patchclamp_server.analysis.steering import difference_of_means
from patchclamp_server.artifacts.corpora import MAX_DOCUMENT_BYTES, Document
from patchclamp_server.text.prompt import PromptEncoder

TARGET, ORDINARY = 0, 1
LABEL = "ordinary text"
# The lengths of so many texts are looked at.
MAX_LENGTHS = 256


def directions(positive: torch.Tensor, negative: torch.Tensor, seed: int) -> torch.Tensor:
    """Returns the directions [layers, d] of states of the target [n, layers, d] and of ordinary text [m, layers, d]."""
    return difference_of_means.directions(positive, negative, seed)


class BesideOrdinaryText:
    """A corpus of the texts of one label and of pieces of ordinary text, one after the other by turns.

    Where the ordinary text ends before the texts do, the rest of them follows.
    """

    def __init__(self, corpus: Corpus, label: int, prompts: PromptEncoder, window_tokens: int) -> None:
        self._corpus = corpus
        self._targets = np.flatnonzero(corpus.document_labels == label)
        self._pieces = _pieces(self._lengths(prompts, window_tokens), len(self._targets), prompts)
        n = 2 * len(self._pieces)
        self.labels: tuple[str, ...] = (corpus.labels[label], LABEL)
        self.document_labels: NDArray[np.int64] = np.zeros(len(self), dtype=np.int64)
        self.document_labels[1:n:2] = ORDINARY
        self.digest = json_digest([corpus.digest, label, [list(piece) for piece in self._pieces]])

    def __len__(self) -> int:
        return len(self._targets) + len(self._pieces)

    def document(self, index: int) -> Document:
        alternating = 2 * len(self._pieces)
        if index < alternating and index % 2:
            return Document(self._pieces[index // 2], ORDINARY)
        place = index // 2 if index < alternating else index - len(self._pieces)
        return Document(self._corpus.document(int(self._targets[place])).text, TARGET)

    def _lengths(self, prompts: PromptEncoder, window_tokens: int) -> list[int]:
        """Returns the numbers of tokens of the first texts, at most those of a window."""
        most = window_tokens - len(prompts.text_start)
        found = []
        for index in self._targets[:MAX_LENGTHS]:
            text = self._corpus.document(int(index)).text
            ids = text if isinstance(text, tuple) else _body(text, prompts)
            found.append(max(1, min(len(ids), most)))
        return found


def _body(text: str, prompts: PromptEncoder) -> tuple[int, ...]:
    return prompts.encode_body(text, "texts", most_tokens=MAX_DOCUMENT_BYTES)


def _pieces(lengths: Sequence[int], n: int, prompts: PromptEncoder) -> list[tuple[int, ...]]:
    """Returns at most n pieces of the ordinary text, one after the other, of these lengths by turns."""
    ids, start = _body(ordinary_text(), prompts), 0
    found: list[tuple[int, ...]] = []
    for i in range(n):
        piece = ids[start : start + lengths[i % len(lengths)]]
        if len(piece) < lengths[i % len(lengths)]:
            break
        found.append(piece)
        start += len(piece)
    return found
