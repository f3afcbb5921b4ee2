"""A model's tokenizer reads a text by the place that the text has in a sequence.

SentencePiece vocabularies write a word with the space before it, and put a space before a text so that its first word
is written like the others. That space belongs to the start of a text alone. With p the prompt and c what follows it,

    tokens(c) = tokens(p + c) from where p ends

so c, which stands in the middle, is read without it. Tokenizers cut a text at control tokens before anything else;
after one, some put the space again (all of Llama 2's do), others do not.
"""

import json
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerBase

from patchclamp_server.text.detokenize import fast_tokenizer, longest_token

Json = dict[str, Any]


@dataclass(frozen=True)
class Tokens:
    """Ids, and for each the characters [start, end) of the text that it covers."""

    ids: list[int]
    spans: list[tuple[int, int]]


class Encoders:
    """Reads texts at each place; no method puts special tokens around a text."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self.start = fast_tokenizer(tokenizer)
        # A text is cut at each of these added tokens, whether they are control tokens or not.
        self._added = {id: token.content.strip() for id, token in tokenizer.added_tokens_decoder.items()}
        self.longest_token = longest_token(self.start)

    def at_start(self, text: str) -> Tokens:
        return encode(self.start, text)

    def after_control(self, text: str) -> Tokens:
        return encode(self._section, text)

    def in_middle(self, text: str) -> Tokens:
        tokens = encode(self._middle, text)
        if self._middle is self._section:
            return tokens
        found = zip(tokens.ids, tokens.spans, strict=True)
        cut = next((i for i, (id, (a, b)) in enumerate(found) if self._added.get(id) == text[a:b].strip()), None)
        if cut is None:
            return tokens
        # From the first added token on, the text is read as it always is behind one.
        start = tokens.spans[cut][0]
        rest = encode(self._section, text[start:])
        spans = [(start + a, start + b) for a, b in rest.spans]
        return Tokens(tokens.ids[:cut] + rest.ids, tokens.spans[:cut] + spans)

    def literally(self, text: str, *, start: bool) -> Tokens:
        """Reads a text at the start or after a control token. Control tokens that are written in it stay the characters
        that they are written with."""
        return encode(self._literal_start if start else self._literal_section, text)

    @cached_property
    def _section(self) -> Tokenizer:
        return _changed(self.start, _prefixed_at_start_only)

    @cached_property
    def _middle(self) -> Tokenizer:
        return _changed(self._section, _never_prefixed)

    @cached_property
    def _literal_start(self) -> Tokenizer:
        return _literal(self.start)

    @cached_property
    def _literal_section(self) -> Tokenizer:
        return self._literal_start if self._section is self.start else _literal(self._section)


def encode(tokenizer: Tokenizer, text: str) -> Tokens:
    encoding = tokenizer.encode(text, add_special_tokens=False)
    return Tokens(encoding.ids, encoding.offsets)


def _literal(tokenizer: Tokenizer) -> Tokenizer:
    """Returns a copy, because the switch is a state that requests would share."""
    copy = Tokenizer.from_str(tokenizer.to_str())
    copy.encode_special_tokens = True
    return copy


def _changed(tokenizer: Tokenizer, change: Callable[[Json], Json | None]) -> Tokenizer:
    """Returns the tokenizer with its normalizer and pre-tokenizer changed; the same object where nothing changes."""
    parts = {"normalizer": tokenizer.normalizer, "pre_tokenizer": tokenizer.pre_tokenizer}
    before = {name: None if part is None else json.loads(part.__getstate__()) for name, part in parts.items()}
    after = {name: _each(step, change) for name, step in before.items()}
    if after == before:
        return tokenizer
    return Tokenizer.from_str(json.dumps({**json.loads(tokenizer.to_str()), **after}))


def _each(step: Json | None, change: Callable[[Json], Json | None]) -> Json | None:
    """Applies `change` to every step of a normalizer or pre-tokenizer; None leaves a step out."""
    if step is None:
        return None
    if step["type"] != "Sequence":
        return change(step)
    key = "normalizers" if "normalizers" in step else "pretokenizers"
    return {**step, key: [new for old in step[key] if (new := _each(old, change)) is not None]}


def _prefixed_at_start_only(step: Json) -> Json:
    if step["type"] == "Metaspace" and step["prepend_scheme"] == "first":
        return {**step, "prepend_scheme": "never"}
    return step


def _never_prefixed(step: Json) -> Json | None:
    """Changes a step so that it puts no space before the text, and keeps the one that is there."""
    match step["type"]:
        case "Prepend":
            return None
        case "Metaspace":
            return {**step, "prepend_scheme": "never"}
        case "ByteLevel":
            return {**step, "add_prefix_space": False}
        case "Strip":
            return {**step, "strip_left": False}
    return step
