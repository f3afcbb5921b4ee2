"""This module turns prompts into token ids: raw text, chat turns with the role of each token, or ids as they are.

Text is a raw completion, so special tokens written in it are parsed. In the content of a chat message they are not: a
control token typed by a user, such as an end of turn, stays the characters that were typed, so no message can open a
turn.

Every text that becomes tokens, a prompt or what a job is about, passes the gate of text_gate.py.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase

from patchclamp_server.errors import InvalidArgument
from patchclamp_server.model.info import ModelInfo
from patchclamp_server.text.chat_template import ChatTemplate, Message, RenderedChat
from patchclamp_server.text.detokenize import IncrementalDetokenizer, piece, token_bytes
from patchclamp_server.text.encoders import Encoders, Tokens
from patchclamp_server.text.text_gate import TextGate
from patchclamp_server.text.text_threads import TextThreads, check_awaited
from patchclamp_server.text.vocabulary import check_ids, first_outside

_MESSAGES = "prompt.chat.messages"


@dataclass(frozen=True)
class EncodedPrompt:
    """Token ids, and for a chat the role of the turn that each belongs to (None where the template does not tell)."""

    ids: tuple[int, ...]
    roles: tuple[str, ...] | None = None


class PromptEncoder:
    """Encodes the three forms of a prompt, and other texts. Refusals of prompts name the field, from "prompt" on.

    `serving` and `analysis` are the threads in which requests and jobs do so, see text_threads.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, info: ModelInfo) -> None:
        self._tokenizer = tokenizer
        self._encoders = Encoders(tokenizer)
        self._info = info
        self._gate = TextGate(self._encoders, info)
        added = tokenizer.added_tokens_decoder
        self._control = {id: token.content for id, token in added.items() if token.special}
        self._unknown = tokenizer.unk_token_id
        self._pieces: dict[int, str] = {}
        self.serving = TextThreads("text")
        self.analysis = TextThreads("analysis-text")
        # These are the special tokens that the tokenizer puts before a text.
        self.text_start = _before("a", self._encoders)

    def close(self) -> None:
        self.serving.close()
        self.analysis.close()

    def encode_text(self, text: str) -> EncodedPrompt:
        """Tokenises a text as it is, with the special tokens that the tokenizer puts around it; where there are any, it
        may be empty."""

        def read(text: str) -> Tokens:
            encoding = self._encoders.start.encode(text, add_special_tokens=True)
            return Tokens(encoding.ids, encoding.offsets)

        return self._checked("prompt.text", self._gate.tokens(read, text, "prompt.text").ids)

    def encode_body(self, text: str, field: str, *, most_tokens: int) -> tuple[int, ...]:
        """Returns the ids of a text of a job, from its start, without special tokens around it. The job may take at
        most `most_tokens` of them."""
        return tuple(self._gate.tokens(self._encoders.at_start, text, field, most_tokens).ids)

    def encode_continuation(
        self, text: str, field: str = "continuation", after: Sequence[int] | None = None
    ) -> tuple[int, ...]:
        """Returns the ids of a text that follows the tokens `after`, as in Score: those that it has in the text of both
        together, where a token ends where it begins. None stands for any words."""
        if after is not None and tuple(after) == self.text_start:
            read = self._encoders.at_start
        elif after and after[-1] in self._control:
            read = self._encoders.after_control
        else:
            read = self._encoders.in_middle
        return tuple(self._gate.tokens(read, text, field).ids)

    def encode_tokens(self, ids: Sequence[int]) -> EncodedPrompt:
        check_ids(ids, self._info.vocab_size, "prompt.tokens.ids")
        return self._checked("prompt.tokens.ids", ids)

    def token_of(self, text: str) -> int | None:
        """Returns the one token that the model has for a text in the middle of another; None where it has none."""
        ids = self._encoders.in_middle(text).ids
        whole = len(ids) == 1 and ids[0] != self._unknown and first_outside(ids, self._info.vocab_size) is None
        return ids[0] if whole else None

    def encode_chat(self, messages: Sequence[tuple[str, str]], continue_final_message: bool = False) -> EncodedPrompt:
        """Renders (role, content) turns by the model's chat template and tokenises them.

        The header and footer of a turn have its role; a default system text has the role "system", and the header of
        the turn to be generated has the role "assistant". With `continue_final_message` the prompt ends with the last
        content.
        """
        template = ChatTemplate.of(self._tokenizer, self._info.name)
        turns = self._turns(messages)
        text = self._render(template, turns, continue_final_message)
        rendered = template.parse(turns, text, continue_final_message)
        if rendered is None:
            return self._encode_opaque(turns, text, continue_final_message)
        return self._encode_rendered(rendered)

    def piece(self, id: int) -> str:
        """Returns the text of one token, see detokenize.piece; it is remembered, because every generated token asks."""
        found = self._pieces.get(id)
        if found is None:
            found = self._pieces[id] = piece(self._tokenizer, id)
        return found

    def pieces(self, ids: Sequence[int]) -> tuple[str, ...]:
        """Returns the text of each token."""
        return tuple(map(self.piece, ids))

    def decode(self, ids: Sequence[int], *, skip_special_tokens: bool) -> str:
        """Returns the text of tokens that start a sequence, as a generation would stream it."""
        detokenizer = IncrementalDetokenizer(self._tokenizer, skip_special_tokens)
        return "".join(map(detokenizer.push, ids)) + detokenizer.flush()

    def text_of(self, ids: Sequence[int]) -> str:
        """Returns the text of consecutive tokens, special or not; U+FFFD for what is no whole character."""
        table = token_bytes(self._tokenizer)
        return b"".join(table.of(id, first=False) for id in ids).decode(errors="replace")

    def bytes_of(self, tokens: int) -> int:
        """Returns the most bytes of text that so many tokens may be read from."""
        return self._gate.bytes_of(tokens)

    def _checked(self, field: str, ids: Sequence[int], roles: tuple[str, ...] | None = None) -> EncodedPrompt:
        if not ids:
            raise InvalidArgument(field, "is empty; a prompt has at least one token")
        if len(ids) > self._info.context_length:
            raise InvalidArgument(
                field, f"has {len(ids)} tokens, more than the context length {self._info.context_length} of the model"
            )
        return EncodedPrompt(tuple(ids), roles)

    def _turns(self, messages: Sequence[tuple[str, str]]) -> list[Message]:
        """Refuses, before anything is rendered, messages that cannot be a chat of this model."""
        context = self._info.context_length
        if not messages:
            raise InvalidArgument(_MESSAGES, "is empty; a chat has at least one message")
        if len(messages) > context:
            raise InvalidArgument(_MESSAGES, f"{len(messages)} messages; a context of {context} tokens holds no more")
        self._gate.check_bytes(sum(len(content.encode()) for _, content in messages), _MESSAGES, context)
        names: set[str] = set()
        for i, (role, _) in enumerate(messages):
            if role not in names and not self._is_name(role):
                raise InvalidArgument(f"{_MESSAGES}[{i}].role", f"{role!r} is not the name of a role")
            names.add(role)
        return [Message(role, content) for role, content in messages]

    def _is_name(self, role: str) -> bool:
        return bool(role) and role.isprintable() and " " not in role and not self._control_in(role)

    def _render(self, template: ChatTemplate, turns: Sequence[Message], continues: bool) -> str:
        try:
            return template.render(turns, generation_prompt=not continues)
        except TemplateError as error:
            index = template.first_refused(turns)
            raise InvalidArgument(
                f"{_MESSAGES}[{index}].role", f"{turns[index].role!r} is refused by the chat template: {error}"
            ) from error

    def _encode_rendered(self, rendered: RenderedChat) -> EncodedPrompt:
        def read(text: str) -> Tokens:
            tokens = self._encoders.at_start(text)
            return self._encode_literally(rendered) if self._control_typed(rendered, tokens) else tokens

        def field_at(start: int, end: int) -> str:
            content = rendered.content_at(start, end)
            return "prompt.chat" if content is None else f"{_MESSAGES}[{content}].content"

        tokens = self._gate.tokens(read, rendered.text, "prompt.chat", field_at=field_at)
        roles = tuple(rendered.role_at(start, end) for start, end in tokens.spans) if rendered.framed else None
        return self._checked("prompt.chat", tokens.ids, roles)

    def _encode_opaque(self, turns: Sequence[Message], text: str, continues: bool) -> EncodedPrompt:
        """Encodes a chat whose template rewrites contents: without roles, and refusing what has no certain meaning."""
        if continues:
            raise InvalidArgument(
                "prompt.chat.continue_final_message", "the chat template rewrites these contents: no end can be found"
            )
        for i, turn in enumerate(turns):
            found = self._control_in(turn.content)
            if found:
                raise InvalidArgument(
                    f"{_MESSAGES}[{i}].content", f"has {found}, a control token of a template that rewrites contents"
                )
        return self._checked("prompt.chat", self._gate.tokens(self._encoders.at_start, text, "prompt.chat").ids)

    def _control_in(self, text: str) -> str:
        """Returns a control token that is written in a text, or ""."""
        return next((content for content in self._control.values() if content in text), "")

    def _control_typed(self, rendered: RenderedChat, tokens: Tokens) -> bool:
        """Returns whether a control token was read, in part at least, from the content of a message."""
        for id, (start, end) in zip(tokens.ids, tokens.spans, strict=True):
            written = rendered.text[start:end]
            if self._is_control(id, written):
                # Some control tokens take the white space around them, which is not part of what was typed.
                start += len(written) - len(written.lstrip())
                end -= len(written) - len(written.rstrip())
                if rendered.content_at(start, end) is not None:
                    return True
        return False

    def _is_control(self, id: int, written: str) -> bool:
        """Whether a token read from these characters is a control token (the unknown token stands for others too)."""
        return id in self._control and (id != self._unknown or self._control[id].strip() == written.strip())

    def _encode_literally(self, rendered: RenderedChat) -> Tokens:
        """Encodes a chat in which only the template's control tokens count as such.

        A tokenizer cuts a text at its control tokens before anything else, so the pieces between those of the template
        can be encoded one by one, without looking for control tokens. On ordinary contents this is the plain encoding.
        """
        skeleton = self._encoders.at_start(rendered.skeleton)
        tokens = Tokens([], [])
        start = 0

        def append(end: int) -> None:
            check_awaited()
            encoded = self._encoders.literally(rendered.text[start:end], start=not start)
            tokens.ids.extend(encoded.ids)
            tokens.spans.extend((start + a, start + b) for a, b in encoded.spans)

        for id, (a, b) in zip(skeleton.ids, skeleton.spans, strict=True):
            if self._is_control(id, rendered.skeleton[a:b]):
                a, b = rendered.from_skeleton(a), rendered.from_skeleton(b)
                append(a)
                tokens.ids.append(id)
                tokens.spans.append((a, b))
                start = b
        append(len(rendered.text))
        return tokens


def _before(text: str, encoders: Encoders) -> tuple[int, ...]:
    """Returns the special tokens that the tokenizer puts before a text."""
    bare = encoders.at_start(text).ids
    whole = encoders.start.encode(text, add_special_tokens=True).ids
    before = next((i for i in range(len(whole)) if whole[i : i + len(bare)] == bare), 0)
    return tuple(whole[:before])
