"""Documents as windows of tokens, and windows as places in documents."""

import pytest
from corpus_runs import BOS, WINDOW, corpus, word_encoder

from patchclamp_server.analysis.corpora.windows import (
    Corpus,
    Cut,
    ListedCorpus,
    Window,
    body_tokens,
    place_of,
    window_at,
    windows,
)
from patchclamp_server.artifacts.corpora import UNLABELLED, Document
from patchclamp_server.errors import InvalidArgument

BODY = WINDOW - 1


async def every(of: Corpus, after: Cut | None = None) -> list[Window]:
    return [window async for window in windows(of, word_encoder(), WINDOW, after or Cut())]


def ids(of: Corpus, index: int) -> tuple[int, ...]:
    text = of.document(index).text
    assert isinstance(text, str)
    return tuple(int(word[1:]) for word in text.split())


async def test_windows_are_prompts_of_the_documents_piece_by_piece_with_what_is_left_at_their_ends() -> None:
    of = corpus(3, 2 * BODY, 2 * BODY + 1)
    found = await every(of)
    assert [(w.document, w.start) for w in found] == [(0, 0), (1, 0), (1, BODY), (2, 0), (2, BODY), (2, 2 * BODY)]
    for window in found:
        assert window.tokens == (BOS, *ids(of, window.document)[window.start : window.start + BODY])
        assert window.label == of.document(window.document).label
    assert [w.is_last for w in found] == [True, False, True, False, False, True]
    text = of.document(0).text
    assert isinstance(text, str)
    assert found[0].tokens == word_encoder().encode_text(text).ids


async def test_behind_each_window_come_the_others() -> None:
    of = corpus(3, 2 * BODY, 2 * BODY + 1)
    found = await every(of)
    for i, window in enumerate(found):
        assert await every(of, Cut.behind(window, BODY)) == found[i + 1 :]


async def test_the_number_of_a_window_tells_where_it_stands() -> None:
    of = corpus(3, 2 * BODY + 1)
    for window in await every(of):
        assert place_of(window.number) == (window.document, window.start)
        assert await window_at(of, word_encoder(), WINDOW, window.number) == window


async def test_documents_may_be_token_ids_and_one_that_the_model_lacks_is_refused_by_its_place() -> None:
    found = await every(ListedCorpus([Document((5, 6)), Document((7,))]))
    assert [w.tokens for w in found] == [(BOS, 5, 6), (BOS, 7)]
    with pytest.raises(InvalidArgument, match="outside the vocabulary") as refused:
        await every(ListedCorpus([Document((5,)), Document((6, 70_000))]))
    assert refused.value.field == "documents[1].ids[1]"


def test_a_window_has_room_for_a_token_beside_the_special_ones() -> None:
    assert body_tokens(word_encoder(), 2) == 1
    with pytest.raises(InvalidArgument) as refused:
        body_tokens(word_encoder(), 1)
    assert refused.value.field == "window_tokens"


def test_a_label_without_a_name_is_refused() -> None:
    with pytest.raises(InvalidArgument) as refused:
        ListedCorpus([Document("a", UNLABELLED), Document("a", 1)], ("one",))
    assert refused.value.field == "documents[1].label"


def test_other_documents_labels_and_names_have_another_digest() -> None:
    digests = {
        ListedCorpus(documents, labels).digest
        for documents, labels in (
            ([Document("a")], ()),
            ([Document("b")], ()),
            ([Document("a"), Document("b")], ()),
            ([Document("a", 0)], ("x",)),
            ([Document("a", 0)], ("y",)),
        )
    }
    assert len(digests) == 5
