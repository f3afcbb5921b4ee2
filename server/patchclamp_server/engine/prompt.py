"""Prompts as token ids: raw text, chat turns with the role of each token, or ids as they are.

Text is a raw completion: special tokens written in it are parsed. The content of a chat message is not: a control
token typed by a user, such as an end of turn, stays the characters that were typed, so no message can open a turn.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

from jinja2 import TemplateError
from tokenizers import Tokenizer
from tokenizers.pre_tokenizers import Metaspace
from transformers import PreTrainedTokenizerBase

from patchclamp_server.engine.chat_layout import ChatLayout, ChatTemplate, Message
from patchclamp_server.engine.text import IncrementalDetokenizer, fast_tokenizer, piece, token_bytes
from patchclamp_server.errors import FailedPrecondition, InvalidArgument
from patchclamp_server.model.info import ModelInfo

_MESSAGES = "prompt.chat.messages"


@dataclass(frozen=True)
class EncodedPrompt:
    """Token ids; for a chat, the role of the turn each belongs to (None where the template does not tell)."""

    ids: tuple[int, ...]
    roles: tuple[str, ...] | None = None


@dataclass(frozen=True)
class _Tokens:
    """Ids with the characters [start, end) of the text that each covers."""

    ids: list[int]
    spans: list[tuple[int, int]]


class PromptEncoder:
    """Encodes the three forms of a prompt. Refusals name the field, from "prompt" on."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, info: ModelInfo) -> None:
        self._tokenizer = tokenizer
        self._backend = fast_tokenizer(tokenizer)
        self._info = info
        added = tokenizer.added_tokens_decoder
        self._control = {id: token.content for id, token in added.items() if token.special}
        self._unknown = tokenizer.unk_token_id
        self._pieces: dict[int, str] = {}

    def encode_text(self, text: str) -> EncodedPrompt:
        """Tokenise as is, with the special tokens the tokenizer puts around a text."""
        if not text:
            raise InvalidArgument("prompt.text", "is empty; a prompt has at least one token")
        return self._checked("prompt.text", self._backend.encode(text, add_special_tokens=True).ids)

    def encode_continuation(self, text: str) -> tuple[int, ...]:
        """Ids of text that follows a prompt, as in Score: no special tokens are put around it."""
        return tuple(self._backend.encode(text, add_special_tokens=False).ids)

    @cached_property
    def text_start(self) -> tuple[int, ...]:
        """The special tokens that the tokenizer puts before a text."""
        bare = self._backend.encode("a", add_special_tokens=False).ids
        whole = self._backend.encode("a", add_special_tokens=True).ids
        before = next(i for i in range(len(whole)) if whole[i : i + len(bare)] == bare)
        return tuple(whole[:before])

    def encode_tokens(self, ids: Sequence[int]) -> EncodedPrompt:
        for i, id in enumerate(ids):
            if not 0 <= id < self._info.vocab_size:
                raise InvalidArgument(
                    f"prompt.tokens.ids[{i}]", f"{id} is outside the vocabulary [0, {self._info.vocab_size})"
                )
        return self._checked("prompt.tokens.ids", ids)

    def encode_chat(self, messages: Sequence[tuple[str, str]], continue_final_message: bool = False) -> EncodedPrompt:
        """Render (role, content) turns by the model's chat template and tokenise them.

        The header and footer of a turn have its role; a default system text has the role "system", the header of the
        turn to be generated the role "assistant". With `continue_final_message` the prompt ends with the last content.
        """
        if not self._tokenizer.chat_template:
            raise FailedPrecondition("prompt.chat", f"{self._info.name} has no chat template; send text or tokens")
        if not messages:
            raise InvalidArgument(_MESSAGES, "is empty; a chat has at least one message")
        turns = [Message(role, content) for role, content in messages]
        for i, turn in enumerate(turns):
            if not turn.role or not turn.role.isprintable() or " " in turn.role or self._control_in(turn.role):
                raise InvalidArgument(f"{_MESSAGES}[{i}].role", f"{turn.role!r} is not the name of a role")
        template = ChatTemplate(self._tokenizer)
        text = self._render(template, turns, continue_final_message)
        layout = template.layout(turns, text, continue_final_message)
        if layout is None:
            return self._encode_opaque(turns, text, continue_final_message)
        text = layout.text
        tokens = self._encode(self._backend, text)
        if self._control_typed(layout, tokens):
            tokens = self._encode_literally(layout)
        roles = tuple(layout.role_at(start, end) for start, end in tokens.spans) if layout.framed else None
        return self._checked("prompt.chat", tokens.ids, roles)

    def piece(self, id: int) -> str:
        """The text of one token, see text.piece; remembered, because every token that is generated asks for it."""
        found = self._pieces.get(id)
        if found is None:
            found = self._pieces[id] = piece(self._tokenizer, id)
        return found

    def pieces(self, ids: Sequence[int]) -> tuple[str, ...]:
        """The text of each token."""
        return tuple(map(self.piece, ids))

    def decode(self, ids: Sequence[int], *, skip_special_tokens: bool) -> str:
        """The text of tokens that start a sequence, as a generation would stream it."""
        detokenizer = IncrementalDetokenizer(self._tokenizer, skip_special_tokens)
        return "".join(map(detokenizer.push, ids)) + detokenizer.flush()

    def text_of(self, ids: Sequence[int]) -> str:
        """The text of consecutive tokens, special or not; U+FFFD for what is no whole character."""
        table = token_bytes(self._tokenizer)
        return b"".join(table.of(id, first=False) for id in ids).decode(errors="replace")

    def _checked(self, field: str, ids: Sequence[int], roles: tuple[str, ...] | None = None) -> EncodedPrompt:
        if not ids:
            raise InvalidArgument(field, "is empty; a prompt has at least one token")
        if len(ids) > self._info.context_length:
            raise InvalidArgument(
                field, f"has {len(ids)} tokens, more than the context length {self._info.context_length} of the model"
            )
        return EncodedPrompt(tuple(ids), roles)

    def _render(self, template: ChatTemplate, turns: Sequence[Message], continues: bool) -> str:
        try:
            return template.render(turns, generation_prompt=not continues)
        except TemplateError as error:
            index = template.first_refused(turns)
            raise InvalidArgument(
                f"{_MESSAGES}[{index}].role", f"{turns[index].role!r} is refused by the chat template: {error}"
            ) from error

    def _encode_opaque(self, turns: Sequence[Message], text: str, continues: bool) -> EncodedPrompt:
        """A template that rewrites this content: no roles, and nothing is encoded whose meaning is not certain."""
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
        return self._checked("prompt.chat", self._encode(self._backend, text).ids)

    def _control_in(self, text: str) -> str:
        """A control token written in a text, or ""."""
        return next((content for content in self._control.values() if content in text), "")

    def _control_typed(self, layout: ChatLayout, tokens: _Tokens) -> bool:
        """Whether a control token was read, in part at least, from the content of a message."""
        for id, (start, end) in zip(tokens.ids, tokens.spans, strict=True):
            written = layout.text[start:end]
            if self._is_control(id, written):
                # Some control tokens take the white space around them; that is not part of what was typed.
                start += len(written) - len(written.lstrip())
                end -= len(written) - len(written.rstrip())
                if layout.touches_content(start, end):
                    return True
        return False

    def _is_control(self, id: int, written: str) -> bool:
        """Whether a token read from these characters is a control token (the unknown token stands for others too)."""
        return id in self._control and (id != self._unknown or self._control[id].strip() == written.strip())

    def _encode_literally(self, layout: ChatLayout) -> _Tokens:
        """Encode with the template's control tokens only.

        A tokenizer cuts a text at its control tokens before anything else, so the pieces between those of the template
        can be encoded one by one, without looking for control tokens. On ordinary contents this is the plain encoding.
        """
        skeleton = self._encode(self._backend, layout.skeleton)
        tokens = _Tokens([], [])
        start = 0
        for id, (a, b) in zip(skeleton.ids, skeleton.spans, strict=True):
            if self._is_control(id, layout.skeleton[a:b]):
                a, b = layout.from_skeleton(a), layout.from_skeleton(b)
                self._append_literal(tokens, layout.text, start, a)
                tokens.ids.append(id)
                tokens.spans.append((a, b))
                start = b
        self._append_literal(tokens, layout.text, start, len(layout.text))
        return tokens

    def _append_literal(self, tokens: _Tokens, text: str, start: int, end: int) -> None:
        encoder = self._literal if start else self._literal_start
        encoded = self._encode(encoder, text[start:end])
        tokens.ids.extend(encoded.ids)
        tokens.spans.extend((start + a, start + b) for a, b in encoded.spans)

    @staticmethod
    def _encode(tokenizer: Tokenizer, text: str) -> _Tokens:
        encoding = tokenizer.encode(text, add_special_tokens=False)
        return _Tokens(encoding.ids, encoding.offsets)

    @cached_property
    def _literal_start(self) -> Tokenizer:
        """The tokenizer without control tokens; its own, because the switch is a state that requests would share."""
        tokenizer = Tokenizer.from_str(self._backend.to_str())
        tokenizer.encode_special_tokens = True
        return tokenizer

    @cached_property
    def _literal(self) -> Tokenizer:
        """The same for a piece that is not the first: no prefix space where only the start of a text gets one."""
        pre_tokenizer = self._literal_start.pre_tokenizer
        if not isinstance(pre_tokenizer, Metaspace) or pre_tokenizer.prepend_scheme != "first":
            return self._literal_start
        tokenizer = Tokenizer.from_str(self._literal_start.to_str())
        tokenizer.encode_special_tokens = True
        tokenizer.pre_tokenizer = Metaspace(pre_tokenizer.replacement, "never", pre_tokenizer.split)
        return tokenizer
