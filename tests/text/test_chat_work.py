"""How much a chat has to be rendered to be read, which roles it keeps, and what happens when its template fails."""

from collections.abc import Sequence
from typing import Any

import pytest
from test_middles import info
from tiny_llama import byte_tokenizer
from transformers import PreTrainedTokenizerFast

from patchclamp_server.errors import FailedPrecondition, InvalidArgument, RequestError
from patchclamp_server.text.prompt import PromptEncoder

# Adjacent tool messages are one turn of the user, as in Qwen's templates; a default system text before all.
TOOLS = (
    "{% if messages[0].role != 'system' %}<|im_start|>system\nBe good.<|im_end|>\n{% endif %}"
    "{% for m in messages %}{% if m.role == 'tool' %}"
    "{% if loop.first or messages[loop.index0 - 1].role != 'tool' %}<|im_start|>user{% endif %}"
    "{{ '\n<response>' }}{{ m.content }}</response>"
    "{% if loop.last or messages[loop.index0 + 1].role != 'tool' %}<|im_end|>\n{% endif %}"
    "{% else %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
ALTERNATING = (
    "{% for m in messages %}{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('roles must alternate') }}{% endif %}"
    "{{ '[' + m.role + '] ' + m.content + '<|im_end|>' }}{% endfor %}"
)
NUMBERED = "{% for m in messages %}{{ '[' + m.role + ' ' ~ loop.index ~ '] ' + m.content + '<|im_end|>' }}{% endfor %}"


class Counting(PreTrainedTokenizerFast):
    """Counts the messages that are rendered, over all renderings."""

    rendered = 0

    def apply_chat_template(self, conversation: Sequence[Any], **options: Any) -> Any:
        self.rendered += len(conversation)
        return super().apply_chat_template(conversation, **options)


def counting(template: Any = None) -> Counting:
    plain = byte_tokenizer()
    own = Counting(tokenizer_object=plain.backend_tokenizer, bos_token="<|im_start|>", eos_token="<|im_end|>")
    own.chat_template = template or plain.chat_template
    return own


def encoder(own: PreTrainedTokenizerFast, context_length: int = 200_000) -> PromptEncoder:
    return PromptEncoder(own, info(259, context_length))


def runs(prompts: PromptEncoder, chat: list[tuple[str, str]]) -> list[tuple[str, str]]:
    """(role, text) of each run of tokens of one role."""
    prompt = prompts.encode_chat(chat)
    assert prompt.roles is not None
    out: list[tuple[str, str]] = []
    for role, text in zip(prompt.roles, prompts.pieces(prompt.ids), strict=True):
        if out and out[-1][0] == role:
            out[-1] = (role, out[-1][1] + text)
        else:
            out.append((role, text))
    return out


def refused(prompts: PromptEncoder, chat: list[tuple[str, str]]) -> RequestError:
    with pytest.raises(RequestError) as error:
        prompts.encode_chat(chat)
    return error.value


def test_a_chat_of_many_roles_takes_linear_work_and_keeps_them_all() -> None:
    chat = [(f"r{i}", f"c{i}") for i in range(1500)]
    own = counting()
    prompt = encoder(own).encode_chat(chat)
    assert prompt.roles is not None
    assert list(dict.fromkeys(prompt.roles)) == [*(role for role, _ in chat), "assistant"]
    assert own.rendered <= 7 * len(chat)


def test_a_long_chat_of_two_roles_takes_a_few_renderings() -> None:
    own = counting(ALTERNATING)
    chat = [("user", "a"), ("assistant", "b")] * 500
    prompt = encoder(own).encode_chat(chat)
    assert prompt.roles is not None
    assert own.rendered <= 3 * len(chat) + 20


def test_a_wrong_role_late_in_a_chat_is_found_in_few_renderings() -> None:
    own = counting(ALTERNATING)
    chat = [("user", "a"), ("assistant", "b")] * 800
    chat[801] = ("user", "again")
    error = refused(encoder(own), chat)
    assert (type(error), error.field) == (InvalidArgument, "prompt.chat.messages[801].role")
    # Half of the chat at each of log2(1600) steps, or as much as has been found to be right.
    assert own.rendered <= 12 * len(chat)


def test_a_template_that_numbers_its_turns_takes_linear_work() -> None:
    own = counting(NUMBERED)
    chat = [("user", "a"), ("assistant", "b")] * 300
    assert encoder(own).encode_chat(chat).roles is None
    assert own.rendered <= 12 * len(chat)


def test_a_turn_that_only_its_place_shows_keeps_its_role() -> None:
    """The header of the second answer differs from those of others."""
    template = (
        "{% for m in messages %}{{ '[' + m.role + ('!' if loop.index0 == 3 else '') + '] ' }}"
        "{{ m.content + '<|im_end|>' }}{% endfor %}"
    )
    found = runs(encoder(counting(template)), [("user", "a"), ("assistant", "b")] * 3)
    assert [text for _, text in found] == [
        "[user] a<|im_end|>",
        "[assistant] b<|im_end|>",
        "[user] a<|im_end|>",
        "[assistant!] b<|im_end|>",
        "[user] a<|im_end|>",
        "[assistant] b<|im_end|>",
    ]


def test_tool_messages_that_follow_each_other_keep_their_roles() -> None:
    chat = [("user", "Hi"), ("assistant", "call"), ("tool", "1"), ("tool", "2"), ("assistant", "Three.")]
    assert runs(encoder(counting(TOOLS)), chat) == [
        ("system", "<|im_start|>system\nBe good.<|im_end|>\n"),
        ("user", "<|im_start|>user\nHi<|im_end|>\n"),
        ("assistant", "<|im_start|>assistant\ncall<|im_end|>\n"),
        ("tool", "<|im_start|>user\n<response>1</response>\n<response>2</response><|im_end|>\n"),
        ("assistant", "<|im_start|>assistant\nThree.<|im_end|>\n<|im_start|>assistant\n"),
    ]


@pytest.mark.parametrize("tools", [["1"], ["1", "2"]], ids=["one", "two"])
def test_a_chat_that_begins_with_a_tool_message_keeps_its_roles(tools: list[str]) -> None:
    found = runs(encoder(counting(TOOLS)), [*(("tool", text) for text in tools), ("assistant", "Three.")])
    assert [role for role, _ in found] == ["system", "tool", "assistant"]
    assert found[1][1].startswith("<|im_start|>user\n<response>1</response>")


@pytest.mark.parametrize(
    ("template", "shown"),
    [
        ("{{ messages[0]['content'] + 1 }}", "TypeError"),
        ("{{ 1 // 0 }}", "ZeroDivisionError"),
        ("{% macro again() %}{{ again() }}{% endmacro %}{{ again() }}", "RecursionError"),
        ("{% for m in messages %}{{ m.content }}", "endfor"),
    ],
    ids=["type", "value", "recursion", "syntax"],
)
def test_a_template_that_fails_is_no_fault_of_the_request_or_the_server(template: str, shown: str) -> None:
    error = refused(encoder(counting(template)), [("user", "a")])
    assert (type(error), error.field) == (FailedPrecondition, "prompt.chat")
    assert shown in error.message


def test_a_template_that_fails_on_other_contents_than_those_that_it_gets_renders_these() -> None:
    own = counting("{% for m in messages %}{{ '%d' % (m.content | int + (1 // (m.content | int))) }}{% endfor %}")
    prompts = encoder(own)
    assert prompts.text_of(prompts.encode_chat([("user", "3")]).ids) == "3"


def test_named_templates_without_a_default_are_none() -> None:
    error = refused(encoder(counting({"tool_use": "{{ 1 }}", "rag": "{{ 2 }}"})), [("user", "a")])
    assert (type(error), error.field) == (FailedPrecondition, "prompt.chat")
    assert "tool_use, rag" in error.message


def test_of_named_templates_the_default_is_rendered() -> None:
    prompts = encoder(counting({"default": "{{ messages[0].content }}!", "rag": "{{ 2 }}"}))
    assert prompts.text_of(prompts.encode_chat([("user", "a")]).ids) == "a!"
