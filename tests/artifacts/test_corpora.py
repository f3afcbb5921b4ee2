"""Corpora: what they are made of, lines of JSON, and what is refused with the place where it is."""

import json
from pathlib import Path

import pytest
import torch
from torch import Tensor

from patchclamp_server.artifacts.corpora import (
    MAX_DOCUMENT_BYTES,
    MAX_LABELS,
    UNLABELLED,
    CorpusBuilder,
    Document,
    StoredCorpus,
)
from patchclamp_server.artifacts.formats import text_json_lines
from patchclamp_server.artifacts.formats.base import CannotExpress, MalformedFile
from patchclamp_server.artifacts.store import ArtifactStore
from patchclamp_server.artifacts.types import Artifact, ArtifactKind
from patchclamp_server.errors import FailedPrecondition, InvalidArgument

LINES = '{"text": "one", "label": "b"}\n{"text": "zwei ä\\n", "label": "a"}\n{"text": "三"}\n'.encode()


@pytest.fixture
def store(tmp_path: Path) -> ArtifactStore:
    return ArtifactStore(tmp_path)


def stored(store: ArtifactStore, lines: bytes = LINES) -> Artifact:
    decoded = text_json_lines.decode(lines)
    info = store.put(ArtifactKind.CORPUS, decoded.tensors, model_fingerprint="", provenance=decoded.provenance)
    return store.get(info.id)


def test_documents_come_back_one_at_a_time_with_their_labels(store: ArtifactStore) -> None:
    corpus = StoredCorpus(stored(store))
    assert list(corpus) == [Document("one", 0), Document("zwei ä\n", 1), Document("三")]
    assert corpus.labels == ("b", "a")
    assert corpus.document(2) == Document("三", UNLABELLED)
    assert corpus.digest == stored(store).info.id


def test_lines_of_json_come_back_as_they_were(store: ArtifactStore, tmp_path: Path) -> None:
    assert text_json_lines.encode(stored(store)) == LINES
    file = tmp_path / "corpus.jsonl"
    file.write_bytes(LINES.rstrip(b"\n"))
    assert text_json_lines.decode(file).tensors["ends"].tolist() == [3, 11, 14]


def test_a_corpus_without_labels_has_no_tensor_of_them() -> None:
    decoded = text_json_lines.decode(b'{"text": "a"}')
    assert decoded.tensors.keys() == {"text", "ends"}
    assert "labels" not in decoded.provenance


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (b"", "line 2: "),
        (b"text", "line 2: "),
        (b'"text"', "expected an object"),
        (b'{"label": "a"}', "expected an object"),
        (b'{"text": 3}', "expected an object"),
        (b'{"text": "a", "lable": "b"}', "unknown key 'lable'"),
        (b'{"text": "a", "label": 3}', "the label 3 is not text"),
        (b'{"text": "a", "label": ""}', "a label of 0 characters"),
        (b'{"text": "a", "text": "b"}', "'text' is there twice"),
        (b'{"text": "a", "label": "b", "label": "c"}', "'label' is there twice"),
        (b'{"text": ""}', "a text of 0 bytes"),
        (b'{"text": "\\ud800"}', "not valid Unicode"),
        (b'{"text": "\xff"}', "line 2: "),
        (json.dumps({"text": "a" * (MAX_DOCUMENT_BYTES + 1)}).encode(), "a document has 1 to 1048576"),
        (b"[" * 100_000, "line 2: "),
        (b" " * (7 * MAX_DOCUMENT_BYTES), "more than"),
    ],
)
def test_a_bad_line_is_refused_with_its_number(line: bytes, message: str) -> None:
    with pytest.raises(MalformedFile, match="line 2: ") as refused:
        text_json_lines.decode(b'{"text": "a"}\n' + line + b'\n{"text": "b"}')
    assert message in str(refused.value)


def test_a_file_without_lines_is_no_corpus() -> None:
    with pytest.raises(MalformedFile, match="no line"):
        text_json_lines.decode(b"")


def test_more_labels_than_a_corpus_has_are_refused() -> None:
    builder = CorpusBuilder()
    for i in range(MAX_LABELS):
        builder.add("a", str(i))
    with pytest.raises(ValueError, match="one more than"):
        builder.add("a", "another")
    assert len(builder) == MAX_LABELS


def corpus(text: bytes = b"abc", ends: list[int] | None = None, **others: Tensor) -> dict[str, Tensor]:
    tensors = {"text": torch.tensor(list(text), dtype=torch.uint8), "ends": torch.tensor(ends or [1, 3])}
    return tensors | others


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        ({"text": torch.ones(1).byte()}, "needs ends"),
        (corpus(other=torch.ones(2)), "'other' is not a tensor"),
        (corpus() | {"text": torch.ones(3)}, "text must be uint8"),
        (corpus() | {"ends": torch.tensor([1.0, 3.0])}, "ends must be int64"),
        (corpus(labels=torch.ones(2)), "labels must be int64"),
        (corpus(labels=torch.ones(1).long()), "1 labels of 2 documents"),
        (corpus(labels=torch.tensor([0, -2])), "labels are from 0 on"),
        (corpus(ends=[1, 1, 3]), "document 1"),
        (corpus(ends=[-1, 3]), "document 0"),
        (corpus(ends=[2, 4]), "document 1"),
        (corpus(ends=[1, 2]), "the last is 2"),
        (corpus(ends=[2**63 - 1, -(2**63)]), "document 0"),
        (corpus("aä".encode(), [2, 3]), "document 1 begins inside a character"),
        (corpus(b"a\xff\xff", [1, 3]), "not UTF-8"),
        (corpus(b"ab\xc3", [1, 3]), "not UTF-8"),
        (corpus(bytes(MAX_DOCUMENT_BYTES + 2), [1, MAX_DOCUMENT_BYTES + 2]), "document 1 has 1048577 bytes"),
        (corpus() | {"ends": torch.ones((1, 2)).long()}, "ends must be \\[n\\]"),
    ],
)
def test_tensors_that_are_no_corpus_are_refused(store: ArtifactStore, tensors: dict[str, Tensor], message: str) -> None:
    with pytest.raises(InvalidArgument, match=message) as refused:
        store.put(ArtifactKind.CORPUS, tensors, model_fingerprint="")
    assert refused.value.field == "tensors"


@pytest.mark.parametrize("labels", [[], ["a", "a"], "ab", ["a", 3], ["a", ""]])
def test_names_that_do_not_fit_the_labels_are_refused(store: ArtifactStore, labels: object) -> None:
    tensors = corpus(labels=torch.tensor([0, 1]))
    with pytest.raises(InvalidArgument) as refused:
        store.put(ArtifactKind.CORPUS, tensors, model_fingerprint="", provenance={"labels": labels})
    assert refused.value.field == "provenance.labels"


def test_a_text_longer_than_a_piece_is_checked_across_its_pieces(store: ArtifactStore) -> None:
    text = "a" + "ä" * (MAX_DOCUMENT_BYTES // 2 - 1)
    builder = CorpusBuilder()
    for _ in range(3):
        builder.add(text)
    info = store.put(ArtifactKind.CORPUS, builder.tensors(), model_fingerprint="")
    assert StoredCorpus(store.get(info.id)).document(2).text == text


def test_a_corpus_is_of_no_model_and_other_kinds_are_of_one(store: ArtifactStore) -> None:
    with pytest.raises(InvalidArgument) as refused:
        store.put(ArtifactKind.CORPUS, corpus(), model_fingerprint="m")
    assert refused.value.field == "model_fingerprint"
    heads = store.put(ArtifactKind.HEAD_SET, {"scores": torch.ones(1, 1)}, model_fingerprint="m")
    with pytest.raises(CannotExpress, match="not a head_set"):
        text_json_lines.encode(store.get(heads.id))
    with pytest.raises(FailedPrecondition, match="not a corpus"):
        StoredCorpus(store.get(heads.id))
