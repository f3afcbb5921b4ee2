"""Prompts: text, token ids or chat turns → the message Prompt."""

from collections.abc import Mapping, Sequence
from typing import TypedDict, cast

from patchclamp.v1 import generation_pb2

Message = tuple[str, str] | Mapping[str, str]
Messages = Sequence[Message]
PromptLike = str | Sequence[int] | Messages


class PromptOptions(TypedDict, total=False):
    """messages: chat turns, (role, content) or {"role", "content"}, instead of a prompt.

    continue_final_message: do not open a new assistant turn. model: default the server's model.
    """

    messages: Messages
    continue_final_message: bool
    model: str


def prompt(source: PromptLike | None, options: PromptOptions) -> generation_pb2.Prompt:
    """Text, token ids or chat turns. ValueError unless exactly one of `source` and options["messages"] is given."""
    messages = options.get("messages")
    if (source is None) == (messages is None):
        raise ValueError("give either a prompt or messages")
    form = source if source is not None else messages
    if isinstance(form, str):
        return generation_pb2.Prompt(text=form)
    items = [] if form is None else list(form)
    if messages is None and not (items and isinstance(items[0], tuple | Mapping)):
        return generation_pb2.Prompt(tokens=generation_pb2.TokenIds(ids=cast(list[int], items)))
    chat = generation_pb2.ChatMessages(
        messages=[_message(turn) for turn in cast(Messages, items)],
        continue_final_message=options.get("continue_final_message", False),
    )
    return generation_pb2.Prompt(chat=chat)


def _message(turn: Message) -> generation_pb2.ChatMessage:
    role, content = turn if isinstance(turn, tuple) else (turn["role"], turn["content"])
    return generation_pb2.ChatMessage(role=role, content=content)
