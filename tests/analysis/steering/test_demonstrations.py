"""How demonstrations become prompts, and which of them are held out."""

import random

import pytest

from patchclamp_server.analysis.steering.definition import DefinitionPrompts
from patchclamp_server.analysis.steering.demonstrations import Demonstration, deranged, prompt
from patchclamp_server.analysis.steering.task_vector import SHOTS, TaskPrompts
from patchclamp_server.errors import InvalidArgument

TASK = [Demonstration(f"in{i}", f"out{i}") for i in range(16)]
# Prompts stay texts, so that a test can read them: a token a character.
Texts = list[str]


def encode(text: str, field: str) -> tuple[int, ...]:
    return tuple(map(ord, text))


def texts(prompts: tuple[tuple[int, ...], ...]) -> Texts:
    return ["".join(map(chr, tokens)) for tokens in prompts]


def test_a_prompt_has_a_line_for_each_demonstration_and_asks_in_the_last() -> None:
    assert prompt(TASK[:2], "x") == "\nin0 => out0\nin1 => out1\nx =>"
    assert prompt((), "x") == "\nx =>"


@pytest.mark.parametrize("n", [2, 3, 9])
def test_no_input_keeps_its_output_when_they_are_exchanged(n: int) -> None:
    exchanged = deranged(TASK[:n], random.Random(5))
    assert [each.input for each in exchanged] == [each.input for each in TASK[:n]]
    assert sorted(each.output for each in exchanged) == sorted(each.output for each in TASK[:n])
    assert all(a.output != b.output for a, b in zip(exchanged, TASK, strict=False))


def test_a_task_is_shown_by_training_demonstrations_and_asked_of_others() -> None:
    found = TaskPrompts.of(TASK, 0.25, 3, encode, encode)
    asked = texts(found.asked)
    assert len(asked) == 4
    assert len(found.demonstrated) == 12
    for text in [*texts(found.demonstrated), *texts(found.exchanged)]:
        before, *lines, last = text.split("\n")
        assert not before
        assert len(lines) == SHOTS
        assert f"\n{last}" not in asked
        assert not any(line.startswith(f"{last} ") for line in lines)
        assert not any(f"{held} " in text for held in asked)
    for held, shown, answer in zip(asked, texts(found.shown), found.answers, strict=True):
        assert shown.endswith(held)
        assert shown.count("\n") == SHOTS + 1
        assert chr(answer) == " "


def test_the_control_has_the_same_inputs_in_the_same_order() -> None:
    found = TaskPrompts.of(TASK, 0.25, 3, encode, encode)
    for own, other in zip(texts(found.demonstrated), texts(found.exchanged), strict=True):
        pairs = zip(own.split("\n"), other.split("\n"), strict=True)
        _, *shown, last = [(a.split(" =>"), b.split(" =>")) for a, b in pairs]
        assert last[0] == last[1]
        assert all(a[0] == b[0] and a[1] != b[1] for a, b in shown)


def test_a_definition_is_asked_after_what_is_asked_of_no_held_out_concept() -> None:
    found = DefinitionPrompts.of(TASK, "a thing", 0.5, 3, encode)
    (defined,) = texts((found.defined,))
    before = defined.removesuffix("\na thing =>")
    assert before.count("\n") == found.shots == 8
    inputs, words = texts(found.definitions), texts(found.words)
    assert len(inputs) == len(words) == 8
    for own, word, bare, bare_word in zip(
        inputs, words, texts(found.bare_definitions), texts(found.bare_words), strict=True
    ):
        assert own == before + bare
        assert word == before + bare_word
        assert bare.replace("in", "out") == bare_word
        assert bare not in before


def test_one_concept_alone_is_nearest_to_itself_and_refused() -> None:
    with pytest.raises(InvalidArgument, match="expected at least 2 concepts") as refused:
        DefinitionPrompts.of(TASK[:4], "a thing", 0.25, 0, encode)
    assert refused.value.field == "demonstrations"
