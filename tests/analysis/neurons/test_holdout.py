"""Which documents are held out, and the corpus that is left of some labels."""

from pathlib import Path

import numpy as np
import torch

from patchclamp_server.analysis.corpora.windows import ListedCorpus
from patchclamp_server.analysis.neurons.localize.by_labels import split
from patchclamp_server.analysis.neurons.localize.holdout import Relabelled, held_out
from patchclamp_server.artifacts.corpora import UNLABELLED, CorpusBuilder, Document, StoredCorpus
from patchclamp_server.artifacts.store import ArtifactStore
from patchclamp_server.artifacts.types import ArtifactKind


def test_the_same_share_of_each_label_is_held_out_and_no_document_without_one() -> None:
    labels = np.array([0] * 40 + [1] * 8 + [UNLABELLED] * 10)
    found = held_out(labels, 0.25, seed=3)
    assert [int(found[labels == label].sum()) for label in (0, 1, UNLABELLED)] == [10, 2, 0]
    assert (held_out(labels, 0.25, seed=3) == found).all()
    assert (held_out(labels, 0.25, seed=4) != found).any()


def test_two_of_a_label_are_on_either_side_where_it_has_four() -> None:
    for n, fraction, expected in ((4, 0.01, 2), (4, 0.99, 2), (3, 0.9, 2), (2, 0.01, 1), (1, 0.9, 1), (9, 0.99, 7)):
        assert int(held_out(np.zeros(n, dtype=np.int64), fraction, 0).sum()) == expected


def test_a_corpus_of_some_labels_reads_only_their_documents() -> None:
    asked = []

    class Counted(ListedCorpus):
        def document(self, index: int) -> Document:
            asked.append(index)
            return super().document(index)

    corpus = Counted([Document(f"text {i}", i % 3) for i in range(9)], ("a", "b", "c"))
    kinds = np.where(corpus.document_labels == 2, 0, UNLABELLED)
    own = Relabelled(corpus, kinds, ("c",))
    assert [own.document(i) for i in range(len(own))] == [Document(f"text {i}", 0) for i in (2, 5, 8)]
    assert asked == [2, 5, 8]


def test_labels_of_a_stored_corpus_are_split_without_reading_a_document(tmp_path: Path) -> None:
    store = ArtifactStore(tmp_path)
    builder = CorpusBuilder()
    for i in range(100):
        builder.add(f"text {i}", "ab"[i % 2] if i < 90 else None)
    info = store.put(ArtifactKind.CORPUS, builder.tensors(), model_fingerprint="", provenance=builder.provenance())
    artifact = store.get(info.id)
    artifact.tensors["text"] = torch.zeros(0, dtype=torch.uint8)
    corpus = StoredCorpus(artifact)
    found = split(corpus, 0.2, 0, "texts")
    assert len(found) == 90
    assert np.bincount(found.document_labels).tolist() == [36, 36, 9, 9]
