"""Needle prompts: as long as asked for, the needle at the depth asked for, and its tokens known."""

from dataclasses import replace

import pytest
from heads_fixtures import writer

from patchclamp_server.analysis.heads.retrieval.needle_prompt import insert, sentence_breaks
from patchclamp_server.analysis.heads.retrieval.needles import (
    Needle,
    NeedleTest,
    Placement,
    built_in_haystacks,
    built_in_needles,
    plan,
)
from patchclamp_server.analysis.ordinary_text import ordinary_text
from patchclamp_server.errors import InvalidArgument
from patchclamp_server.model.load import LoadedModel

RED = Needle("Which key?", "The key is of red glass.", "red glass")
STORY = "It rained. Mr. Long came in, wet. “Who is there?” she said. Nobody knew! It was late; he left."


@pytest.mark.parametrize("length", [100, 256, 1000, 1536, 8000])
@pytest.mark.parametrize("depth", [0.0, 0.35, 1.0])
def test_a_prompt_has_the_length_asked_for_and_never_more(embedded: LoadedModel, length: int, depth: float) -> None:
    write = writer(embedded, NeedleTest())
    for needle in (0, 9):
        ids = write.write(Placement(needle, length, depth)).ids
        assert length - 8 <= len(ids) <= length


@pytest.mark.parametrize("template", [True, False], ids=["chat", "plain"])
def test_the_positions_decode_to_the_needle_and_to_the_answer(embedded: LoadedModel, template: bool) -> None:
    model = replace(embedded, info=replace(embedded.info, has_chat_template=template))
    write = writer(model, NeedleTest())
    for index, needle in enumerate(built_in_needles()):
        prompt = write.write(Placement(index, 300, 0.5))
        decode = model.tokenizer.decode
        assert decode(prompt.ids[prompt.needle.start : prompt.needle.stop]).strip() == needle.needle
        assert decode(prompt.ids[prompt.answer.start : prompt.answer.stop]).strip(" .") == needle.answer.strip(".")
        assert set(prompt.answer) <= set(prompt.needle)
        text = decode(prompt.ids)
        assert text.startswith("<|im_start|>") == template
        assert text.rstrip().endswith("assistant" if template else "Answer:")


def test_needle_tokens_are_found_by_bytes_where_characters_have_several_tokens(tiny_llama: LoadedModel) -> None:
    """One token a byte; quotation marks of the text before the needle have three."""
    needle = Needle("What?", "“Ünder” the über-chair.", "über-chair")
    write = writer(tiny_llama, NeedleTest(haystacks=("“Über,” said he. " * 9,), needles=(needle,), lengths=(190,)))
    prompt = write.write(Placement(0, 190, 0.6))
    ids, decode = prompt.ids, tiny_llama.tokenizer.decode
    assert len(ids) <= 190
    assert decode(ids[prompt.needle.start : prompt.needle.stop]) == needle.needle
    assert decode(ids[prompt.answer.start : prompt.answer.stop]) == needle.answer


def test_a_text_that_is_too_short_is_repeated(tiny_llama: LoadedModel) -> None:
    write = writer(tiny_llama, NeedleTest(haystacks=("It rains. ",), needles=(RED,), lengths=(200,)))
    prompt = write.write(Placement(0, 200, 0.0))
    assert 192 <= len(prompt.ids) <= 200
    assert tiny_llama.tokenizer.decode(prompt.ids).count("It rains.") > 5


def test_sentences_end_after_their_marks_but_not_after_a_title() -> None:
    parts = [STORY[a:b] for a, b in zip(sentence_breaks(STORY), sentence_breaks(STORY)[1:], strict=False)]
    assert parts == [
        "It rained. ",
        "Mr. Long came in, wet. ",
        "“Who is there?” ",
        "she said. ",
        "Nobody knew! ",
        "It was late; he left.",
    ]


def test_sentences_of_a_script_without_spaces_are_found() -> None:
    assert sentence_breaks("\u4e0b\u96e8\u3002\u4ed6\u6765\uff01") == [0, 3, 6]


def test_a_text_is_cut_between_words_where_it_has_any(tiny_llama: LoadedModel) -> None:
    for text, ending in (("wonderful " * 30, "wonderful"), ("\u4e0b\u96e8" * 60, "")):
        write = writer(tiny_llama, NeedleTest(haystacks=(text,), needles=(RED,), lengths=(200,)))
        ids = write.write(Placement(0, 200, 0.0)).ids
        assert 190 <= len(ids) <= 200
        assert f"{ending}\n\nQuestion" in tiny_llama.tokenizer.decode(ids)


@pytest.mark.parametrize(
    ("depth", "before"),
    [(0.0, ""), (0.13, "It rained. "), (0.5, "It rained. Mr. Long came in, wet. “Who is there?” "), (1.0, STORY + " ")],
)
def test_the_needle_stands_at_the_sentence_break_nearest_to_the_depth(depth: float, before: str) -> None:
    text = insert(STORY, "NEEDLE.", depth)
    assert text.startswith(before + "NEEDLE.")
    assert text.replace("NEEDLE. ", "").replace(" NEEDLE.", "") == STORY


def test_there_are_at_least_twelve_needles_over_text_enough_and_none_is_known_to_it() -> None:
    assert len(built_in_needles()) >= 12
    assert sum(len(text.encode()) for text in built_in_haystacks()) >= 120_000
    for needle in built_in_needles():
        assert needle.answer in needle.needle
        assert not any(needle.answer in text for text in (*built_in_haystacks(), ordinary_text()))
    assert not any(ordinary_text()[:200] in text for text in built_in_haystacks())


def test_a_plan_has_all_runs_in_a_seeded_order(embedded: LoadedModel) -> None:
    test = NeedleTest(needles=(RED, RED), lengths=(100, 200), depths=(0.0, 0.5, 1.0), seed=3)
    runs = plan(test, embedded.info).placements
    assert len(runs) == len(set(runs)) == 12
    assert runs == plan(test, embedded.info).placements
    assert runs != plan(replace(test, seed=4), embedded.info).placements
    assert plan(replace(test, max_runs=5), embedded.info).placements == runs[:5]


def test_default_lengths_go_as_far_as_the_context(embedded: LoadedModel) -> None:
    def lengths(context: int) -> set[int]:
        return {p.length for p in plan(NeedleTest(), replace(embedded.info, context_length=context)).placements}

    assert lengths(8192) == {256, 512, 1024, 1536}
    assert lengths(1024) == {256, 512}
    with pytest.raises(InvalidArgument, match="no default fits a context of 128"):
        lengths(128)


@pytest.mark.parametrize(
    ("test", "field"),
    [
        (NeedleTest(needles=(RED, replace(RED, answer="blue glass"))), "test.needles[1].answer"),
        (NeedleTest(needles=(replace(RED, answer=""),)), "test.needles[0].answer"),
        (NeedleTest(needles=(replace(RED, question=" "),)), "test.needles[0].question"),
        (NeedleTest(needles=(replace(RED, needle=RED.needle + "\n"),)), "test.needles[0].needle"),
        (NeedleTest(haystacks=("Long ago.", "\n")), "test.haystacks[1]"),
        (NeedleTest(haystacks=(f"Long ago. {RED.needle}",), needles=(RED,)), "test.haystacks[0]"),
        (NeedleTest(lengths=(256, 9000)), "test.lengths[1]"),
        (NeedleTest(lengths=(0,)), "test.lengths[0]"),
        (NeedleTest(depths=(0.5, 1.5)), "test.depths[1]"),
        (NeedleTest(depths=(float("nan"),)), "test.depths[0]"),
        (NeedleTest(depths=(0.5,) * 70), "test.max_runs"),
        (NeedleTest(depths=(0.5,) * 2000), "test"),
    ],
)
def test_a_test_that_cannot_be_run_is_refused_by_field(embedded: LoadedModel, test: NeedleTest, field: str) -> None:
    with pytest.raises(InvalidArgument) as refused:
        plan(test, embedded.info)
    assert refused.value.field == field


@pytest.mark.parametrize(
    ("length", "message"), [(60, "no room for text"), (8190, "no room for an answer"), (8192, "no room for an answer")]
)
def test_a_length_without_room_beside_the_needle_is_refused(embedded: LoadedModel, length: int, message: str) -> None:
    with pytest.raises(InvalidArgument, match=message) as refused:
        writer(embedded, NeedleTest()).write(Placement(0, length, 0.5))
    assert refused.value.field == "test.lengths"
