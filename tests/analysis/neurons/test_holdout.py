"""Which documents are held out, and the corpus that is left of some labels."""

import asyncio
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

from patchclamp_server.analysis.corpora.windows import ListedCorpus
from patchclamp_server.analysis.neurons.localize.by_labels import split
from patchclamp_server.analysis.neurons.localize.holdout import Relabelled, held_out, of_documents_run
from patchclamp_server.analysis.neurons.texts import TextSource
from patchclamp_server.analysis.probes.texts import LabelledStates, labelled_states
from patchclamp_server.artifacts.corpora import UNLABELLED, CorpusBuilder, Document, StoredCorpus
from patchclamp_server.artifacts.store import ArtifactStore
from patchclamp_server.artifacts.types import ArtifactKind
from patchclamp_server.engine.config import EngineConfig
from patchclamp_server.engine.engine import Engine
from patchclamp_server.engine.request import Capture
from patchclamp_server.interventions.pooling import Pooling
from patchclamp_server.model.load import load_model
from patchclamp_server.model.sites import Site
from patchclamp_server.text.prompt import PromptEncoder


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


@pytest.fixture(scope="module")
def engine(tiny_llama_dir: Path) -> Iterator[Engine]:
    engine = Engine(load_model(str(tiny_llama_dir)), EngineConfig())
    engine.start()
    yield engine
    engine.shutdown()


# A text of no token, such as one of the special tokens that begin any, has no window: nothing of it is run.
EMPTY: tuple[int, ...] = ()


@pytest.mark.parametrize("empty", range(5))
def test_a_document_without_a_token_is_no_example_of_a_probe(engine: Engine, empty: int) -> None:
    """Wherever it would be dealt to: a part may have no other of its label."""
    texts = [Document(EMPTY if label == 0 and i == empty else (5 + i, 6), label) for label in (0, 1) for i in range(5)]
    capture = Capture(Site.RESID_POST, (0,), Pooling.LAST_TOKEN)

    async def collected(texts: list[Document]) -> LabelledStates:
        source, encoder = TextSource(ListedCorpus(texts, ("a", "b")), 16), PromptEncoder(model.tokenizer, model.info)
        states = labelled_states(engine, encoder, source, capture, fraction=0.4, seed=0, numbers=None)
        [found] = [event async for event in states if isinstance(event, LabelledStates)]
        return found

    model = engine.model
    found = asyncio.run(collected([*texts, Document((90, 91), 0)]))
    for part in range(3):
        _, examples = found.part(part)
        assert set(examples.y.tolist()) == {0.0, 1.0}


def test_a_token_that_is_left_over_for_a_window_of_its_own_is_no_example(engine: Engine) -> None:
    model = engine.model
    lengths = (1, 16, 17, 18, 33)
    texts = [Document(tuple(range(5, 5 + n)), label) for label in (0, 1) for n in lengths]
    capture = Capture(Site.RESID_POST, (0,), Pooling.LAST_TOKEN)

    async def counted() -> list[int]:
        source, encoder = TextSource(ListedCorpus(texts, ("a", "b")), 16), PromptEncoder(model.tokenizer, model.info)
        states = labelled_states(engine, encoder, source, capture, fraction=0.4, seed=0, numbers=None)
        [found] = [event async for event in states if isinstance(event, LabelledStates)]
        return np.bincount(found.documents).tolist()

    assert asyncio.run(counted()) == [1, 1, 1, 2, 2] * 2


def test_documents_that_are_not_run_have_no_label() -> None:
    labels = np.array([0, 1, 1, UNLABELLED, 0, 1])
    assert of_documents_run(labels, [0, 0, 2, 4]).tolist() == [0, UNLABELLED, 1, UNLABELLED, 0]
    assert of_documents_run(labels, []).tolist() == []
