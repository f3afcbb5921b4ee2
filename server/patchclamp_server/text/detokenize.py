"""Turns token ids into text that is final: incremental detokenisation, and stop strings across token borders."""

import codecs
import json
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, NamedTuple

from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerBase

from patchclamp_server.errors import FailedPrecondition, InvalidArgument

_BYTE_TOKEN = re.compile(r"<0x([0-9A-Fa-f]{2})>")
# These steps of a decoder look at one token at a time, except at the first token and in runs of byte tokens.
_TOKENWISE_DECODERS = frozenset({"Replace", "ByteFallback", "Fuse", "Strip", "Metaspace"})


class TokenPiece(NamedTuple):
    """The bytes that a token adds to a text that has begun, and the same as `text` where they are whole characters."""

    added: bytes
    text: str | None
    special: bool


class TokenBytes:
    """Knows the UTF-8 bytes that each token adds; the text of a sequence is the decoding of their concatenation.

    In byte-level BPE (GPT-2, Llama 3, Qwen, SmolLM) these are the bytes that its characters stand for. In SentencePiece
    (Gemma, Llama 2, Mistral) they are the byte of a byte-fallback token, otherwise the text that it adds after another
    token. At the start of the sequence, where some tokenizers drop a prefix space, they are its text by itself.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self._tokenizer = fast_tokenizer(tokenizer)
        kinds = _decoder_kinds(self._tokenizer)
        self._byte_level = "ByteLevel" in kinds
        if not self._byte_level and not (kinds and kinds <= _TOKENWISE_DECODERS):
            raise FailedPrecondition(
                "model", f"no incremental decoding for a tokenizer with the decoder {sorted(kinds)}"
            )
        self._byte_fallback = "ByteFallback" in kinds
        self._special = frozenset(id for id, token in tokenizer.added_tokens_decoder.items() if token.special)
        # The anchor is any token with text of its own: what follows it is not at the start of the sequence.
        self._anchor = 0 if self._byte_level else self._find_anchor()
        self._anchor_text = self._tokenizer.decode([self._anchor], skip_special_tokens=False)
        # This remembers the pieces of tokens that follow another one, as nearly all do.
        self._following: dict[int, TokenPiece] = {}

    def is_special(self, id: int) -> bool:
        return id in self._special

    def following(self, id: int) -> "TokenPiece":
        """Returns what a token adds after another one, which is looked up once."""
        found = self._following.get(id)
        if found is None:
            added = self.of(id, first=False)
            try:
                text = added.decode()
            except UnicodeDecodeError:
                text = None
            found = self._following[id] = TokenPiece(added, text, self.is_special(id))
        return found

    def of(self, id: int, *, first: bool) -> bytes:
        """Returns the bytes of a token; none for an id that the tokenizer lacks (padding of the embedding matrix)."""
        token = self._tokenizer.id_to_token(id)
        if token is None:
            return b""
        if self._byte_level:
            mapped = [_BYTE_OF_CHARACTER.get(character) for character in token]
            values = [value for value in mapped if value is not None]
            # Added tokens are plain text. Like the decoder, this knows them by a character that stands for no byte.
            return bytes(values) if len(values) == len(mapped) else token.encode()
        byte = _BYTE_TOKEN.fullmatch(token) if self._byte_fallback else None
        if byte and (not first or int(byte[1], 16) >= 0x80):
            return bytes([int(byte[1], 16)])
        if first:
            return self._tokenizer.decode([id], skip_special_tokens=False).encode()
        text = self._tokenizer.decode([self._anchor, id], skip_special_tokens=False)
        return text[len(self._anchor_text) :].encode()

    def _find_anchor(self) -> int:
        for id in self._tokenizer.encode("a", add_special_tokens=False).ids:
            if self._tokenizer.decode([id], skip_special_tokens=False).strip():
                return id
        raise FailedPrecondition("model", "the tokenizer cannot express the letter a")


@lru_cache(maxsize=8)
def token_bytes(tokenizer: PreTrainedTokenizerBase) -> TokenBytes:
    """Returns the one table of a tokenizer, which its sequences share."""
    return TokenBytes(tokenizer)


def fast_tokenizer(tokenizer: PreTrainedTokenizerBase) -> Tokenizer:
    """Returns the Rust tokenizer behind a tokenizer. It neither truncates nor pads texts, whatever its file says.

    Raises FailedPrecondition where there is none.
    """
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if not isinstance(backend, Tokenizer):
        raise FailedPrecondition("model", f"needs a fast tokenizer (tokenizer.json), not {type(tokenizer).__name__}")
    # It is changed only where there is something to switch off, because it cannot be changed while it encodes in
    # another thread.
    if backend.truncation is not None:
        backend.no_truncation()
    if backend.padding is not None:
        backend.no_padding()
    return backend


def piece(tokenizer: PreTrainedTokenizerBase, id: int) -> str:
    """Returns the text of one token, special or not, with its leading space; U+FFFD for what is no character."""
    return token_bytes(tokenizer).of(id, first=False).decode(errors="replace")


class IncrementalDetokenizer:
    """Gives the text of a growing sequence of tokens, character by character as it becomes final.

    The pushes and flush() together are ``tokenizer.decode(all)`` without the clean-up of spaces before punctuation, or,
    with `after`, what ``tokenizer.decode(after + all)`` adds to ``tokenizer.decode(after)``: the word that follows a
    prompt keeps its space, which decoders of SentencePiece drop at the start of a text.
    A character whose bytes are not all there is held back; bytes that can no longer become one are U+FFFD. One
    difference: `decode` gives up a whole run of byte-fallback tokens when a part of it is invalid; here its valid
    characters, which may have been sent already, stay. Each token takes constant work.
    """

    def __init__(
        self, tokenizer: PreTrainedTokenizerBase, skip_special_tokens: bool = True, after: Iterable[int] = ()
    ) -> None:
        self._bytes = token_bytes(tokenizer)
        self._skip_special_tokens = skip_special_tokens
        self._characters = codecs.getincrementaldecoder("utf-8")(errors="replace")
        self._first = all(skip_special_tokens and self._bytes.is_special(id) for id in after)
        # This tells whether bytes are held back that may be the beginning of a character.
        self._holds_bytes = False

    def push(self, token_id: int) -> str:
        added, text, special = self._bytes.following(token_id)
        if special and self._skip_special_tokens:
            return ""
        if self._first:
            self._first = False
            added, text = self._bytes.of(token_id, first=True), None
        if text is None or self._holds_bytes:
            text = self._characters.decode(added)
            self._holds_bytes = bool(self._characters.getstate()[0])
        return text

    def flush(self) -> str:
        """Returns what is left at the end: U+FFFD for an unfinished character."""
        return self._characters.decode(b"", final=True)


@dataclass(frozen=True)
class StopResult:
    """Text that is final, and the stop string that ended it, if one did."""

    text_to_emit: str
    matched: str | None = None


class StopChecker:
    """Looks for stop strings in streamed text, holding back only the longest suffix that could still become one.

    The string that is complete first matches; of those complete at the same character, the longest. So it does not
    depend on how the text is cut into pushes. Each string has a Knuth-Morris-Pratt automaton, so a character takes
    O(strings).
    """

    def __init__(self, strings: Sequence[str], include_stop_string: bool = False) -> None:
        for i, string in enumerate(strings):
            if not string:
                raise InvalidArgument(f"stop.strings[{i}]", "is empty; a stop string has at least one character")
        self.strings = tuple(strings)
        self._borders = tuple(_borders(string) for string in strings)
        self._include = include_stop_string
        # For each string, this is the length of its longest prefix that ends the text so far.
        self._matched = [0] * len(strings)
        self._held = ""

    def push(self, text: str) -> StopResult:
        """Returns the text that has become final. Nothing may be pushed once `matched` is set: the sequence is over."""
        seen = len(self._held)
        text = self._held + text
        for end in range(seen + 1, len(text) + 1):
            matched = self._step(text[end - 1])
            if matched:
                self._held = ""
                return StopResult(text[: end if self._include else end - len(matched)], matched)
        final = len(text) - max(self._matched, default=0)
        self._held = text[final:]
        return StopResult(text[:final])

    def flush(self) -> str:
        """Returns the text held back, when the sequence ends for another reason."""
        held, self._held = self._held, ""
        self._matched = [0] * len(self.strings)
        return held

    def _step(self, character: str) -> str:
        """Advances every automaton by one character and returns the longest string completed by it, or ""."""
        completed = ""
        for i, (string, borders) in enumerate(zip(self.strings, self._borders, strict=True)):
            length = self._matched[i]
            while length and string[length] != character:
                length = borders[length]
            length += string[length] == character
            self._matched[i] = length
            if length == len(string) and length > len(completed):
                completed = string
        return completed


def _borders(string: str) -> list[int]:
    """Returns, for n = 0 … len(string), the length of the longest proper prefix of string[:n] that is also its
    suffix."""
    borders = [0, 0]
    for n in range(1, len(string)):
        length = borders[n]
        while length and string[length] != string[n]:
            length = borders[length]
        borders.append(length + (string[length] == string[n]))
    return borders


def longest_token(tokenizer: Tokenizer) -> int:
    """Returns a number of bytes of text that no token exceeds."""
    byte_level = "ByteLevel" in _decoder_kinds(tokenizer)
    added = tokenizer.get_added_tokens_decoder().values()
    # A character of a byte-level token is one byte; other tokens decode to no more bytes than they are written with.
    lengths = (len(token if byte_level else token.encode()) for token in tokenizer.get_vocab(with_added_tokens=False))
    return max(1, *lengths, *(len(token.content.encode()) for token in added))


def _decoder_kinds(tokenizer: Tokenizer) -> frozenset[str]:
    """Returns the names of the steps of the tokenizer's decoder; it is empty when there is no decoder."""
    if tokenizer.decoder is None:
        return frozenset()
    config: dict[str, Any] = json.loads(tokenizer.decoder.__getstate__())
    steps = config["decoders"] if config["type"] == "Sequence" else [config]
    return frozenset(step["type"] for step in steps)


def _byte_of_character() -> dict[str, int]:
    """Returns GPT-2's alphabet: a printable byte of Latin-1 stands for itself, the n-th other byte is U+0100 + n."""
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = (byte for byte in range(0x100) if byte not in printable)
    return {chr(byte): byte for byte in printable} | {chr(0x100 + n): byte for n, byte in enumerate(others)}


_BYTE_OF_CHARACTER = _byte_of_character()
