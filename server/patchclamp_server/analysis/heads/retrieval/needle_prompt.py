"""Prompts of an exact length: a text with a statement hidden in it, and a question about the statement.

    <text up to a sentence break> <needle> <rest of the text>  <question>

Which tokens are the needle's is told by characters: tokens are laid over the UTF-8 bytes they stand for.
"""

import re
from bisect import bisect_left, bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate

from patchclamp_server.analysis.heads.retrieval.needles import Needle, Placement, Plan
from patchclamp_server.errors import FailedPrecondition, InvalidArgument
from patchclamp_server.model.info import ModelInfo
from patchclamp_server.text.detokenize import TokenBytes
from patchclamp_server.text.prompt import PromptEncoder

CHAT = "Read the text and answer the question.\n\nText: {text}\n\nQuestion: {question}"
PLAIN = CHAT + "\nAnswer:"
# A model may repeat the whole needle, and say a little more.
ANSWER_MARGIN = 16
# Texts are cut between words, so a prompt may be some tokens shorter than asked for.
TOLERANCE = 4
ATTEMPTS = 8
# A sentence does not end after a title or an initial. Full-width marks need no space after them.
SENTENCE_END = re.compile(
    r"(?<!\bMr)(?<!\bMrs)(?<!\bDr)(?<!\bSt)(?<!\b[A-Z])[.?!][\"'\u201d\u2019)]*(?:\s+|$)"
    r"|[\u3002\uff1f\uff01][\u201d\u2019\u300d\u300f\uff09]*\s*"
)
# Where no white space is near, the language writes words without any.
BEGUN_WORD = re.compile(r"(?<=\s)\S{0,40}\Z")


@dataclass(frozen=True)
class NeedlePrompt:
    """The token ids of a prompt, and the positions whose characters belong, in part at least, to needle and answer."""

    ids: tuple[int, ...]
    needle: range
    answer: range

    @property
    def max_tokens(self) -> int:
        """Returns the most tokens to generate."""
        return len(self.needle) + ANSWER_MARGIN


class PromptWriter:
    """Writes the prompts of a plan: a user's turn in the model's chat template, or plain text where it has none."""

    def __init__(self, plan: Plan, info: ModelInfo, encoder: PromptEncoder, tokens: TokenBytes) -> None:
        self.plan = plan
        self._info = info
        self._encoder = encoder
        self._tokens = tokens
        self._texts = [
            _Text(text, encoder, tokens, f"test.haystacks[{i}]", info.context_length)
            for i, text in enumerate(plan.haystacks)
        ]

    def write(self, placement: Placement) -> NeedlePrompt:
        """Returns a prompt of at most `placement.length` tokens, which may be shorter by a few.

        Raises InvalidArgument for a length without room for text beside the needle, or for the answer in the context.
        """
        needle, length = self.plan.needles[placement.needle], placement.length
        field = f"test.needles[{placement.needle}].needle"
        answer = len(self._encoder.encode_continuation(needle.needle, field)) + ANSWER_MARGIN
        self._encoder.encode_continuation(needle.question, f"test.needles[{placement.needle}].question")
        if length + answer > self._info.context_length:
            raise InvalidArgument(
                "test.lengths",
                f"{length} leaves no room for an answer of {answer} tokens (needle {placement.needle}) in a "
                f"context of {self._info.context_length}",
            )
        text = self._texts[placement.needle % len(self._texts)]
        frame = len(self._encode(needle, needle.needle))
        # Words at a border may be encoded otherwise than alone, so the first cut can miss by a few tokens.
        room = length - frame
        best: tuple[int, ...] = ()
        for _ in range(ATTEMPTS):
            ids = self._encode(needle, insert(text.of_tokens(room), needle.needle, placement.depth))
            if len(best) < len(ids) <= length:
                best = ids
            room += length - len(ids)
            if 0 <= length - len(ids) <= TOLERANCE or room < 1:
                break
        if len(best) <= frame:
            raise InvalidArgument(
                "test.lengths",
                f"{length} leaves no room for text: needle {placement.needle}, its question and the template take "
                f"{frame} tokens",
            )
        return self._located(best, needle)

    def _encode(self, needle: Needle, text: str) -> tuple[int, ...]:
        if self._info.has_chat_template:
            return self._encoder.encode_chat([("user", CHAT.format(text=text, question=needle.question))]).ids
        return self._encoder.encode_text(PLAIN.format(text=text, question=needle.question)).ids

    def _located(self, ids: tuple[int, ...], needle: Needle) -> NeedlePrompt:
        written = [self._tokens.of(id, first=i == 0) for i, id in enumerate(ids)]
        statement, words = needle.needle.encode(), needle.answer.encode()
        start = b"".join(written).find(statement)
        if start < 0:
            raise FailedPrecondition("test.needles", f"the tokenizer does not keep the text {needle.needle!r}")
        ends = list(accumulate(map(len, written)))
        answer = start + statement.find(words)
        return NeedlePrompt(
            ids,
            _overlapping(ends, start, start + len(statement)),
            _overlapping(ends, answer, answer + len(words)),
        )


def insert(text: str, needle: str, depth: float) -> str:
    """Returns the text with the needle at the sentence break nearest to `depth` of its characters."""
    place = min(sentence_breaks(text), key=lambda at: abs(at - depth * len(text)))
    before, after = text[:place], text[place:]
    gap = "" if not before or before[-1].isspace() else " "
    return before + gap + needle + (" " + after if after else "")


def sentence_breaks(text: str) -> list[int]:
    """Returns the start, and every place after the end of a sentence and the white space that follows it."""
    return [0, *(match.end() for match in SENTENCE_END.finditer(text))]


class _Text:
    """A haystack, repeated as often as it takes, which can be cut after any number of tokens up to `most`."""

    def __init__(self, text: str, encoder: PromptEncoder, tokens: TokenBytes, field: str, most: int) -> None:
        # No more text is kept than `most` tokens can be read from.
        self._text = text.strip().encode()[: encoder.bytes_of(most)].decode(errors="ignore").encode()
        self._encoder = encoder
        self._tokens = tokens
        self._field = field

    @cached_property
    def _ends(self) -> Sequence[int]:
        """Returns the byte at which each token of the text ends."""
        ids = self._encoder.encode_continuation(self._text.decode(), self._field)
        return list(accumulate(len(self._tokens.of(id, first=False)) for id in ids))

    def of_tokens(self, n: int) -> str:
        """Returns the start of n tokens, or of the few fewer that end with a word; "" for n < 1."""
        repeats, rest = divmod(max(n, 0), len(self._ends))
        end = self._ends[rest - 1] if rest else 0
        cut = self._text[:end].decode(errors="ignore")
        if not self._text[end : end + 1].isspace():
            cut = BEGUN_WORD.sub("", cut)
        return "\n".join([self._text.decode()] * repeats + [cut]).rstrip()


def _overlapping(ends: Sequence[int], start: int, end: int) -> range:
    """Returns the tokens with a byte in [start, end), where token i ends before byte ends[i]."""
    return range(bisect_right(ends, start), bisect_left(ends, end) + 1)
