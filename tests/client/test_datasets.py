"""Data sets of the client: what they hold, where it comes from, and how it is cut."""

from importlib.resources import files

import pytest

from patchclamp import datasets
from patchclamp.neurons import average_precision, fact_messages


@pytest.mark.parametrize("name", datasets.names())
def test_every_data_set_states_its_source_and_licence_and_is_small(name: str) -> None:
    dataset = datasets.load(name)
    assert dataset.name == name
    assert dataset.license
    assert dataset.source
    assert f"`{name}.json`" in (files(datasets) / "LICENSES.md").read_text(encoding="utf-8")
    assert len((files(datasets) / f"{name}.json").read_bytes()) < 200_000


@pytest.mark.parametrize("name", datasets.names())
def test_every_data_set_has_two_labels_or_more_of_distinct_texts(name: str) -> None:
    texts = datasets.load(name).texts
    assert len(texts) >= 2
    for own in texts.values():
        assert len(own) >= 40
        assert len(set(own)) == len(own)
        assert all(text.strip() for text in own)


def test_an_unknown_name_is_refused_with_those_there_are() -> None:
    with pytest.raises(ValueError, match="no data set is called 'capitals'; there are code, languages, relations"):
        datasets.load("capitals")


def test_facts_of_a_relation_have_candidates_that_are_other_answers_of_it() -> None:
    for facts in datasets.load("relations").facts.values():
        answers = {fact.answer for fact in facts}
        for fact in facts:
            assert len(set(fact.candidates)) == 4
            assert set(fact.candidates) <= answers - {fact.answer}


def test_texts_of_relations_are_the_prompts_of_their_facts() -> None:
    relations = datasets.load("relations")
    assert {label: [fact.prompt for fact in own] for label, own in relations.facts.items()} == {
        label: list(own) for label, own in relations.texts.items()
    }


def test_halves_share_nothing_and_leave_nothing_out() -> None:
    relations = datasets.load("relations")
    first, second = relations.halves()
    for label, own in relations.facts.items():
        assert sorted([*first.facts[label], *second.facts[label]], key=own.index) == list(own)
        assert not set(first.texts[label]) & set(second.texts[label])


def test_halves_of_relations_are_about_different_countries() -> None:
    first, second = datasets.load("relations").halves()
    answers = [{fact.answer for fact in half.facts["capital"]} for half in (first, second)]
    assert not answers[0] & answers[1]


def test_nonwords_are_as_many_as_the_words_of_the_sentence_and_none_is_one_of_them() -> None:
    texts = datasets.load("sentences").texts
    words = {word for text in texts["sentences"] for word in text.lower().split()}
    for sentence, listed in zip(texts["sentences"], texts["nonwords"], strict=True):
        assert len(listed.split()) == len(sentence.replace("'", " ").split())
        assert not words & set(listed.lower().split())


def test_a_data_set_is_what_methods_and_tests_take() -> None:
    relations = datasets.load("relations")
    message = average_precision(relations.texts, "capital").average_precision
    assert [group.label for group in message.texts.groups] == list(relations.texts)
    assert len(fact_messages(relations.facts["capital"], "facts")) == 60
