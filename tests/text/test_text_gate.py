"""What a text must be to become tokens: short enough to look at, whole, and of ids that the model has a row for."""

import pytest
from test_middles import info
from text_tokenizers import KINDS, tokenizer
from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerFast

from patchclamp_server.errors import InvalidArgument
from patchclamp_server.interventions.program import Scope, TokenSelector
from patchclamp_server.interventions.scopes import check_scope
from patchclamp_server.text.prompt import PromptEncoder

PLAIN = "{% for m in messages %}{{ m['role'] + ': ' + m['content'] + '</s>' }}{% endfor %}"
REWRITES = "{% for m in messages %}{{ m['content'] | upper }}{% endfor %}"


def own_copy(kind: str, template: str | None = None) -> PreTrainedTokenizerFast:
    backend = Tokenizer.from_str(tokenizer(kind).backend_tokenizer.to_str())
    own = PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<unk>", bos_token="<s>", eos_token="</s>")
    own.chat_template = template
    return own


def beyond(template: str = PLAIN, *, special: bool = True) -> PromptEncoder:
    """With a token [PAD] that the embedding has no row for."""
    own = own_copy("llama2", template)
    size = len(own)
    own.add_tokens(["[PAD]", "[pad]"], special_tokens=special)
    return PromptEncoder(own, info(size))


def refused(call, *arguments, **named):  # type: ignore[no-untyped-def]
    with pytest.raises(InvalidArgument) as error:
        call(*arguments, **named)
    return error.value


@pytest.mark.parametrize(
    ("call", "field"),
    [
        (lambda e: e.encode_text("once [PAD]"), "prompt.text"),
        (lambda e: e.encode_continuation("once [PAD]", "text", ()), "text"),
        (lambda e: e.encode_continuation("[PAD]", "pairs[0].clean_answer", e.text_start), "pairs[0].clean_answer"),
        (lambda e: e.encode_body("once [PAD]", "texts[1]", most_tokens=100), "texts[1]"),
        (lambda e: e.encode_tokens([1, 10**6]), "prompt.tokens.ids[1]"),
    ],
    ids=["text", "continuation", "answer", "document", "ids"],
)
def test_a_token_that_the_model_has_no_row_for_is_refused_where_it_stands(call, field: str) -> None:  # type: ignore[no-untyped-def]
    error = refused(call, beyond())
    assert error.field == field
    assert "outside the vocabulary" in error.message


def test_the_refusal_names_the_token() -> None:
    assert "'[PAD]'" in refused(beyond().encode_text, "once [PAD]").message


def test_a_control_token_without_a_row_stays_text_in_a_message() -> None:
    own = beyond()
    ids = own.encode_chat([("user", "once [PAD]")]).ids
    assert max(ids) < own._info.vocab_size
    assert "[PAD]" in own.text_of(ids)


def test_another_added_token_without_a_row_is_refused_in_its_message() -> None:
    error = refused(beyond(special=False).encode_chat, [("user", "once"), ("user", "[PAD]")])
    assert error.field == "prompt.chat.messages[1].content"


def test_a_template_that_writes_one_is_refused() -> None:
    own = beyond("{% for m in messages %}{{ '[PAD]' + m['content'] }}{% endfor %}")
    assert refused(own.encode_chat, [("user", "once")]).field == "prompt.chat"
    rewriting = beyond(REWRITES, special=False)
    assert refused(rewriting.encode_chat, [("user", "[pad]")]).field == "prompt.chat"


def test_a_word_whose_token_has_no_row_is_no_word_of_the_model() -> None:
    own = beyond(special=False)
    assert own.token_of("[PAD]") is None
    assert own.token_of(" time") is not None


def test_a_scope_names_only_tokens_of_the_model() -> None:
    scope = Scope((TokenSelector(token_ids=(1, 2, 300)),))
    error = refused(check_scope, scope, "scope", vocab_size=300, has_roles=False)
    assert error.field == "scope.include[0].token_ids[2]"


@pytest.mark.parametrize("kind", KINDS)
def test_a_text_is_neither_cut_nor_filled_up_whatever_the_tokenizer_says(kind: str) -> None:
    want = {text: tokenizer(kind)(text)["input_ids"] for text in ("once", "once upon a time hello world " * 4)}
    own = own_copy(kind)
    own.backend_tokenizer.enable_truncation(8)
    own.backend_tokenizer.enable_padding(length=16, pad_id=0, pad_token="<unk>")
    encoder = PromptEncoder(own, info())
    for text, ids in want.items():
        assert list(encoder.encode_text(text).ids) == ids


def test_a_chat_is_not_cut_where_contents_are_read_literally() -> None:
    own = own_copy("gemma", PLAIN)
    own.backend_tokenizer.enable_truncation(8)
    chat = [("user", "once upon a time </s> hello world"), ("assistant", "drink")]
    assert PromptEncoder(own, info()).text_of(PromptEncoder(own, info()).encode_chat(chat).ids).endswith("drink</s>")


def test_an_empty_text_is_a_prompt_where_a_text_begins_with_a_token() -> None:
    own = PromptEncoder(tokenizer("llama2"), info())
    assert own.encode_text("").ids == own.text_start == (1,)


@pytest.mark.parametrize(
    ("call", "field"),
    [
        (lambda e, text: e.encode_text(text), "prompt.text"),
        (lambda e, text: e.encode_continuation(text, "text", (1,)), "text"),
        (lambda e, text: e.encode_body(text, "texts[0]", most_tokens=8), "texts[0]"),
        (lambda e, text: e.encode_chat([("user", text[:-5]), ("user", text[-5:])]), "prompt.chat.messages"),
    ],
    ids=["text", "continuation", "document", "chat"],
)
def test_a_text_of_more_bytes_than_tokens_could_have_is_not_tokenised(call, field: str) -> None:  # type: ignore[no-untyped-def]
    read: list[str] = []

    class Reading(PreTrainedTokenizerFast):
        """A template is rendered before its text is read."""

        def apply_chat_template(self, *arguments, **named):  # type: ignore[no-untyped-def]
            read.append("rendered")
            return super().apply_chat_template(*arguments, **named)

    own = Reading(tokenizer_object=own_copy("gemma").backend_tokenizer, unk_token="<unk>", chat_template=PLAIN)
    encoder = PromptEncoder(own, info(context_length=8))
    most = encoder.bytes_of(8)
    assert most == 8 * max(len(token.encode()) for token in own.get_vocab())
    error = refused(call, encoder, "x" * (most + 1))
    assert error.field == field
    assert f"at most {most} are read" in error.message
    assert not read


def test_a_text_of_many_short_tokens_is_refused_before_all_of_it_is_tokenised() -> None:
    """A token has up to nine bytes, so that so many bytes could be 10,000 tokens."""
    encoder = PromptEncoder(tokenizer("llama2"), info(context_length=10_000))
    text = "x" * encoder.bytes_of(10_000)
    error = refused(encoder.encode_text, text)
    assert error.field == "prompt.text"
    assert "far more than the 10000 tokens" in error.message


def test_a_text_of_long_tokens_that_fits_is_read_however_many_bytes_it_has() -> None:
    own = tokenizer("byte level")
    longest = max((token for token in own.get_vocab() if token.isascii()), key=len)
    text = f" {longest}" * 5000
    encoder = PromptEncoder(own, info(context_length=len(own(text)["input_ids"])))
    assert list(encoder.encode_text(text).ids) == own(text)["input_ids"]


def test_the_bytes_of_a_byte_level_token_are_its_characters() -> None:
    own = PromptEncoder(tokenizer("byte level"), info())
    assert own.bytes_of(1) == max(len(token) for token in tokenizer("byte level").get_vocab())


def test_more_messages_than_a_context_has_tokens_are_not_rendered() -> None:
    encoder = PromptEncoder(own_copy("gemma", PLAIN), info(context_length=8))
    assert refused(encoder.encode_chat, [("user", "")] * 9).field == "prompt.chat.messages"
