"""Incremental detokenisation equals decoding the whole; stop strings are found across token borders."""

from itertools import pairwise
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models
from transformers import AutoTokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from patchclamp_server.errors import FailedPrecondition, InvalidArgument
from patchclamp_server.text.detokenize import IncrementalDetokenizer, StopChecker, piece

REPLACEMENT = "\ufffd"
# The vocabulary of the embedded model lacks some control characters and the bytes F1 and F2 of unassigned planes.
WRITABLE = st.characters(max_codepoint=0x3FFFF, exclude_categories=["Cc", "Cs"])


@pytest.fixture(scope="module")
def tokenizer(embedded_dir: Path) -> PreTrainedTokenizerBase:
    return AutoTokenizer.from_pretrained(embedded_dir)


def sentencepiece_like(*steps: decoders.Decoder) -> PreTrainedTokenizerFast:
    """A tokenizer with byte fallback, decoded by the given steps: pieces as SentencePiece writes them."""
    pieces = ["<unk>", "<s>", "▁the", "▁cat", "s", "▁", "a", "好", *(f"<0x{byte:02X}>" for byte in range(256))]
    backend = Tokenizer(
        models.BPE({piece: id for id, piece in enumerate(pieces)}, [], unk_token="<unk>", byte_fallback=True)
    )
    backend.decoder = decoders.Sequence(list(steps))
    return PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<unk>", bos_token="<s>")


@pytest.fixture(scope="module")
def llama2_like() -> PreTrainedTokenizerFast:
    return sentencepiece_like(
        decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)
    )


@pytest.fixture(scope="module")
def gemma_like() -> PreTrainedTokenizerFast:
    return sentencepiece_like(decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse())


def streamed(tokenizer: PreTrainedTokenizerBase, ids: list[int], skip_special_tokens: bool = True) -> str:
    detokenizer = IncrementalDetokenizer(tokenizer, skip_special_tokens)
    return "".join(detokenizer.push(id) for id in ids) + detokenizer.flush()


def decoded(tokenizer: PreTrainedTokenizerBase, ids: list[int], skip_special_tokens: bool = True) -> str:
    text = tokenizer.decode(ids, skip_special_tokens=skip_special_tokens, clean_up_tokenization_spaces=False)
    assert isinstance(text, str)
    return text


@pytest.fixture(scope="module")
def single_bytes(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Ids of tokens that are one byte: any byte sequence can be written with them."""
    vocabulary = tokenizer.get_vocab()
    return [id for token, id in sorted(vocabulary.items()) if len(token) == 1]


@settings(max_examples=300, deadline=None)
@given(ids=st.lists(st.integers(0, 49151), max_size=60), skip=st.booleans())
def test_random_tokens_stream_to_their_decoding(tokenizer: PreTrainedTokenizerBase, ids: list[int], skip: bool) -> None:
    assert streamed(tokenizer, ids, skip) == decoded(tokenizer, ids, skip)


@settings(max_examples=300, deadline=None)
@given(places=st.lists(st.integers(0, 255), max_size=60))
def test_random_bytes_stream_to_their_decoding(
    tokenizer: PreTrainedTokenizerBase, single_bytes: list[int], places: list[int]
) -> None:
    ids = [single_bytes[place % len(single_bytes)] for place in places]
    assert streamed(tokenizer, ids) == decoded(tokenizer, ids)


@settings(max_examples=200, deadline=None)
@given(text=st.text(alphabet=st.one_of(WRITABLE, st.sampled_from("😀👩‍👩‍👧‍👦漢字かな한국 \n")), max_size=40))
def test_any_text_comes_back_whole_and_no_piece_of_it_shows_an_incomplete_character(
    tokenizer: PreTrainedTokenizerBase, text: str
) -> None:
    ids = tokenizer.encode(text, add_special_tokens=False, split_special_tokens=True)
    detokenizer = IncrementalDetokenizer(tokenizer)
    pushes = [detokenizer.push(id) for id in ids]
    assert "".join(pushes) + detokenizer.flush() == text
    assert "".join(pushes).count(REPLACEMENT) == text.count(REPLACEMENT)


def test_a_character_is_held_until_its_last_byte_is_there(tokenizer: PreTrainedTokenizerBase) -> None:
    ids = tokenizer.encode("🦜", add_special_tokens=False)
    assert len(ids) > 1
    detokenizer = IncrementalDetokenizer(tokenizer)
    assert [detokenizer.push(id) for id in ids] == [""] * (len(ids) - 1) + ["🦜"]


def test_an_unfinished_character_is_replaced_at_the_end_only(tokenizer: PreTrainedTokenizerBase) -> None:
    first = tokenizer.encode("🦜", add_special_tokens=False)[0]
    detokenizer = IncrementalDetokenizer(tokenizer)
    assert detokenizer.push(first) == ""
    assert detokenizer.flush() == REPLACEMENT


def test_special_tokens_are_left_out_or_shown(tokenizer: PreTrainedTokenizerBase) -> None:
    ids = tokenizer.encode("Hi<|im_end|> there", add_special_tokens=False)
    assert streamed(tokenizer, ids) == "Hi there"
    assert streamed(tokenizer, ids, skip_special_tokens=False) == "Hi<|im_end|> there"


def test_ids_beyond_the_tokenizer_add_no_text(tokenizer: PreTrainedTokenizerBase) -> None:
    assert streamed(tokenizer, [*tokenizer.encode("a"), 60_000, *tokenizer.encode(" b")]) == "a b"


@pytest.mark.parametrize("kind", ["llama2_like", "gemma_like"])
@settings(max_examples=200, deadline=None)
@given(places=st.lists(st.sampled_from(["▁the", "▁cat", "s", "▁", "a", "好", "🦜", "é", "<s>"]), max_size=20))
def test_sentencepiece_tokens_stream_to_their_decoding(
    request: pytest.FixtureRequest, kind: str, places: list[str]
) -> None:
    tokenizer = request.getfixturevalue(kind)
    vocabulary = tokenizer.get_vocab()
    ids = []
    for place in places:
        ids += [vocabulary[place]] if place in vocabulary else [vocabulary[f"<0x{b:02X}>"] for b in place.encode()]
    assert streamed(tokenizer, ids) == decoded(tokenizer, ids)
    assert streamed(tokenizer, ids, False) == decoded(tokenizer, ids, False)


def test_only_the_first_piece_of_a_sentencepiece_text_loses_its_space(llama2_like: PreTrainedTokenizerFast) -> None:
    the, cat = llama2_like.convert_tokens_to_ids(["▁the", "▁cat"])
    detokenizer = IncrementalDetokenizer(llama2_like)
    assert [detokenizer.push(id) for id in (the, cat, the)] == ["the", " cat", " the"]


def test_a_broken_run_of_byte_tokens_keeps_the_characters_already_sent(llama2_like: PreTrainedTokenizerFast) -> None:
    ids = llama2_like.convert_tokens_to_ids([f"<0x{byte:02X}>" for byte in "é".encode() + b"\xe5"])
    detokenizer = IncrementalDetokenizer(llama2_like)
    assert [detokenizer.push(id) for id in ids] == ["", "é", ""]
    assert detokenizer.flush() == REPLACEMENT


def test_a_decoder_that_is_not_tokenwise_is_refused() -> None:
    backend = Tokenizer(models.WordPiece({"[UNK]": 0, "a": 1}, unk_token="[UNK]"))
    backend.decoder = decoders.WordPiece()
    with pytest.raises(FailedPrecondition, match="WordPiece"):
        IncrementalDetokenizer(PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="[UNK]"))


def test_a_piece_is_the_text_of_one_token_with_its_space(
    tokenizer: PreTrainedTokenizerBase, llama2_like: PreTrainedTokenizerFast
) -> None:
    ids = tokenizer.encode("Hello there<|im_end|>")
    assert [piece(tokenizer, id) for id in ids] == ["Hello", " there", "<|im_end|>"]
    assert piece(llama2_like, llama2_like.convert_tokens_to_ids("▁the")) == " the"
    assert REPLACEMENT in piece(tokenizer, tokenizer.encode("🦜")[0])


def test_without_stop_strings_nothing_is_held_back() -> None:
    checker = StopChecker(())
    assert checker.push("anything").text_to_emit == "anything"
    assert checker.flush() == ""


def test_only_what_could_become_a_stop_string_is_held_back() -> None:
    checker = StopChecker(["END", "###"])
    assert checker.push("text E").text_to_emit == "text "
    assert checker.push("N").text_to_emit == ""
    assert checker.push("E#").text_to_emit == "ENE"
    assert checker.flush() == "#"


def test_a_stop_string_is_found_across_tokens_and_ends_the_text_before_it() -> None:
    checker = StopChecker(["\n\nUser"])
    results = [checker.push(text) for text in ("fine.\n", "\nUs", "er: more")]
    assert [r.text_to_emit for r in results] == ["fine.", "", ""]
    assert [r.matched for r in results] == [None, None, "\n\nUser"]


def test_the_stop_string_can_be_kept_and_what_follows_it_is_not() -> None:
    result = StopChecker(["stop"], include_stop_string=True).push("please stop now")
    assert (result.text_to_emit, result.matched) == ("please stop", "stop")


def test_the_first_match_wins_and_of_those_ending_together_the_longest() -> None:
    assert StopChecker(["c", "abc", "bc"]).push("xabcx").matched == "abc"
    assert StopChecker(["zz", "b"]).push("abzz").matched == "b"


def test_a_stop_string_that_overlaps_itself_is_found() -> None:
    checker = StopChecker(["aab"])
    assert checker.push("aa").text_to_emit == ""
    assert checker.push("a").text_to_emit == "a"
    assert checker.push("b").matched == "aab"


def test_an_empty_stop_string_is_refused_by_its_index() -> None:
    with pytest.raises(InvalidArgument) as refused:
        StopChecker(["x", ""])
    assert refused.value.field == "stop.strings[1]"


@settings(max_examples=400, deadline=None)
@given(
    text=st.text("ab\n", max_size=40),
    strings=st.lists(st.text("ab\n", min_size=1, max_size=5), max_size=4),
    cuts=st.lists(st.integers(0, 40), max_size=8),
    include=st.booleans(),
)
def test_the_result_does_not_depend_on_the_cuts_and_nothing_is_held_without_need(
    text: str, strings: list[str], cuts: list[int], include: bool
) -> None:
    # The definition: the first end of any stop string, then the longest that ends there.
    ends = [(end, -len(s), s) for end in range(len(text) + 1) for s in strings if text[:end].endswith(s)]
    end, _, matched = min(ends, default=(len(text), 0, None))
    want = text[:end] if include or matched is None else text[: end - len(matched)]

    checker = StopChecker(strings, include)
    emitted, pushed, found = "", "", None
    borders = [0, *sorted(min(cut, len(text)) for cut in cuts), len(text)]
    for start, stop in pairwise(borders):
        result = checker.push(text[start:stop])
        pushed += text[start:stop]
        emitted += result.text_to_emit
        found = result.matched
        if found:
            break
        held = pushed[len(emitted) :]
        longest = max((n for s in strings for n in range(len(s)) if pushed.endswith(s[:n])), default=0)
        assert len(held) == longest
    assert emitted + checker.flush() == want
    assert found == matched
