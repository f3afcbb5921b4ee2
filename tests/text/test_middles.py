"""What stands in the middle of a text is read and written as it is in the whole text, by every kind of tokenizer.

The oracle is transformers on the whole text.
"""

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from text_tokenizers import KINDS, PREFIXING, WORDS, tokenizer
from transformers import PreTrainedTokenizerFast

from patchclamp_server.model.info import ModelInfo
from patchclamp_server.text.detokenize import IncrementalDetokenizer
from patchclamp_server.text.prompt import PromptEncoder

TEXTS = st.lists(st.sampled_from([*WORDS, " ", " ", "Once", "é", "x", ".", "\n", "  "]), max_size=8).map("".join)


def info(vocab_size: int = 1000, context_length: int = 512) -> ModelInfo:
    return ModelInfo("m", "f", "llama", 2, 32, 64, 4, 2, 8, vocab_size, context_length, "float32", "cpu", {}, True)


def encoder(kind: str) -> PromptEncoder:
    return PromptEncoder(tokenizer(kind), info())


def cut(whole: PreTrainedTokenizerFast, prompt: str, continuation: str) -> tuple[list[int], list[int]] | None:
    """Ids before and after the end of the prompt, where a token ends there."""
    encoding = whole(prompt + continuation, return_offsets_mapping=True)
    ids, spans = encoding["input_ids"], encoding["offset_mapping"]
    after = next((i for i, (start, end) in enumerate(spans) if end > len(prompt)), len(ids))
    return (ids[:after], ids[after:]) if all(start >= len(prompt) for start, _ in spans[after:]) else None


@pytest.mark.parametrize("kind", KINDS)
@given(prompt=TEXTS, continuation=TEXTS)
@settings(max_examples=150, deadline=None, derandomize=True)
def test_a_continuation_has_the_tokens_that_it_has_in_the_whole_text(kind: str, prompt: str, continuation: str) -> None:
    parts = cut(tokenizer(kind), prompt, continuation)
    assume(parts is not None)
    assert parts is not None
    before = encoder(kind).encode_text(prompt).ids
    assume(before == tuple(parts[0]))
    # A unigram model weighs the characters around one that it does not know anew.
    assume(tokenizer(kind).unk_token_id not in before)
    assert encoder(kind).encode_continuation(continuation, "text", before) == tuple(parts[1])


@pytest.mark.parametrize("kind", PREFIXING)
def test_a_continuation_that_goes_on_in_a_word_gets_no_space(kind: str) -> None:
    own = encoder(kind)
    ids = own.encode_continuation("lo world", "text", own.encode_text("hel").ids)
    assert own.text_of(ids) == "lo world"


@pytest.mark.parametrize("kind", KINDS)
def test_a_word_with_its_space_is_one_token_where_the_vocabulary_has_it(kind: str) -> None:
    own = encoder(kind)
    whole = tokenizer(kind)(f"{WORDS[0]} time")["input_ids"]
    assert own.encode_continuation(" time", "text", own.encode_text(WORDS[0]).ids) == tuple(whole[-1:])


@pytest.mark.parametrize("kind", KINDS)
def test_what_follows_an_empty_prompt_is_the_start_of_a_text(kind: str) -> None:
    own = encoder(kind)
    start = own.encode_text("").ids
    assert start + own.encode_continuation("once upon", "text", start) == own.encode_text("once upon").ids


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("continuation", ["upon a time", " upon", "upon</s>a time", "</s> a"])
def test_behind_a_control_token_a_text_is_read_as_it_is_in_the_whole(kind: str, continuation: str) -> None:
    own = encoder(kind)
    for prompt in ("once</s>", "once"):
        parts = cut(tokenizer(kind), prompt, continuation)
        assert parts is not None
        assert own.encode_continuation(continuation, "text", parts[0]) == tuple(parts[1])


@pytest.mark.parametrize("kind", KINDS)
@given(data=st.data())
@settings(max_examples=150, deadline=None, derandomize=True)
def test_generated_text_is_what_it_adds_to_the_text_of_the_prompt(kind: str, data: st.DataObject) -> None:
    own = tokenizer(kind)
    # Byte tokens of one character may stand on both sides of the border; transformers then rewrites the prompt.
    pieces = [id for token, id in sorted(own.get_vocab().items()) if token.isascii() or "▁" in token]
    pieces = [id for id in pieces if not str(own.convert_ids_to_tokens(id)).startswith("<0x")]
    tokens = st.lists(st.sampled_from(pieces), max_size=6)
    prompt = [own.bos_token_id, *data.draw(tokens)]
    generated = data.draw(tokens)
    detokenizer = IncrementalDetokenizer(own, after=prompt)
    text = "".join(detokenizer.push(id) for id in generated) + detokenizer.flush()
    before, whole = (own.decode(ids, skip_special_tokens=True) for ids in (prompt, prompt + generated))
    assert before + text == whole


@pytest.mark.parametrize("kind", KINDS)
def test_the_first_generated_word_keeps_its_space(kind: str) -> None:
    own = tokenizer(kind)
    prompt, word = own("once")["input_ids"], own("once upon")["input_ids"][-1]
    assert IncrementalDetokenizer(own, after=prompt).push(word) == " upon"
