"""Prompts: text, token ids or chat turns → the message Prompt."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, TypedDict, cast

from patchclamp.fields import build, build_as, shown
from patchclamp.v1 import generation_pb2

Message = tuple[str, str] | Mapping[str, str]
Messages = Sequence[Message]
PromptLike = str | Sequence[int] | Messages

_TURN = '(role, content) or {"role": ..., "content": ...}'


class PromptOptions(TypedDict, total=False):
    """Options of everything that takes a prompt.

    messages: chat turns, (role, content) or {"role", "content"}, instead of a prompt.
    continue_final_message: whether the last turn goes on instead of a new one of the assistant. model: by default the
    server's model.
    """

    messages: Messages | None
    continue_final_message: bool
    model: str


def prompt(
    source: PromptLike | None,
    *,
    messages: Messages | None = None,
    continue_final_message: bool = False,
    field: str = "prompt",
) -> generation_pb2.Prompt:
    """Returns the message of a text, of token ids or of chat turns. `field` is what errors call `source`.

    Raises ValueError unless exactly one of `source` and `messages` is given, and for continue_final_message without a
    chat.
    """
    if (source is None) == (messages is None):
        raise ValueError(f"{field}: give either a prompt or messages")
    form, field = (messages, "messages") if source is None else (source, field)
    if isinstance(form, str) and source is not None:
        return _not_continued(continue_final_message, build_as({"text": field}, generation_pb2.Prompt, text=form))
    if isinstance(form, str | bytes) or not isinstance(form, Iterable):
        accepted = f"turns, each {_TURN}" if source is None else f"a text, token ids or chat turns, each {_TURN}"
        raise TypeError(f"{field}: expected {accepted}, got {shown(form)}")
    items = list(form)
    if source is not None and not (items and isinstance(items[0], tuple | list | Mapping)):
        ids = build_as({"ids": field}, generation_pb2.TokenIds, ids=cast(list[int], items))
        return _not_continued(continue_final_message, generation_pb2.Prompt(tokens=ids))
    turns = [_message(turn, f"{field}[{i}]") for i, turn in enumerate(items)]
    chat = build(generation_pb2.ChatMessages, messages=turns, continue_final_message=continue_final_message)
    return generation_pb2.Prompt(chat=chat)


def _not_continued(continues: bool, message: generation_pb2.Prompt) -> generation_pb2.Prompt:
    if continues:
        raise ValueError("continue_final_message: only a chat has a final message; send the prompt as turns")
    return message


def _message(turn: Any, field: str) -> generation_pb2.ChatMessage:
    """Returns a turn, and refuses what else one of another library holds, such as tool_calls: it would be lost."""
    match turn:
        case (role, content):
            pass
        case Mapping() if set(turn) == {"role", "content"}:
            role, content = turn["role"], turn["content"]
        case _:
            raise TypeError(f"{field}: expected {_TURN}, got {shown(turn)}")
    names = {"role": f"{field}.role", "content": f"{field}.content"}
    return build_as(names, generation_pb2.ChatMessage, role=role, content=content)
