"""Where the turns of a chat and their contents lie in the text that a chat template renders.

The template is rendered once more with a placeholder for every content, the skeleton; what stands between the
placeholders is the template's own text. Rendering the growing prefixes messages[:i] of the skeleton tells where a turn
ends.
"""

import re
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate

from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase

# Private-use characters: no white space, which templates trim, and nothing a template looks for.
_PLACEHOLDER = re.compile("\ue000([0-9]+)\ue001")


@dataclass(frozen=True)
class Message:
    role: str
    content: str


@dataclass(frozen=True)
class ChatLayout:
    """The rendered text as parts[0] contents[0] … contents[n-1] parts[n]; the parts are the template's own text."""

    parts: tuple[str, ...]
    contents: tuple[str, ...]
    # Start of each run of one role, and the roles; both empty where the template does not tell its turns apart.
    starts: tuple[int, ...]
    roles: tuple[str, ...]

    @property
    def framed(self) -> bool:
        return bool(self.roles)

    @cached_property
    def text(self) -> str:
        return _interleave(self.parts, self.contents)

    @cached_property
    def skeleton(self) -> str:
        return _interleave(self.parts, [_placeholder(i) for i in range(len(self.contents))])

    def role_at(self, start: int, end: int) -> str:
        """Role of a token by its first character (a token without characters: by its place)."""
        assert start <= end
        return self.roles[bisect_right(self.starts, start) - 1]

    def touches_content(self, start: int, end: int) -> bool:
        """Whether characters [start, end) of the text overlap a content."""
        # Content k ends where part k + 1 starts; the first one that ends after `start` is the one to look at.
        k = bisect_right(self._text_starts, start, lo=1) - 1
        return k < len(self.contents) and self._text_starts[k + 1] - len(self.contents[k]) < end

    def from_skeleton(self, offset: int) -> int:
        """Offset in the text of an offset in one of the template's own parts of the skeleton."""
        part = bisect_right(self._skeleton_starts, offset) - 1
        return offset - self._skeleton_starts[part] + self._text_starts[part]

    @cached_property
    def _text_starts(self) -> list[int]:
        return _part_starts(self.parts, self.contents)

    @cached_property
    def _skeleton_starts(self) -> list[int]:
        return _part_starts(self.parts, [_placeholder(i) for i in range(len(self.contents))])


class ChatTemplate:
    """The chat template of a tokenizer. Renderings raise jinja2.TemplateError where the template refuses."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self._tokenizer = tokenizer

    def render(self, turns: Sequence[Message], generation_prompt: bool) -> str:
        text = self._tokenizer.apply_chat_template(
            [{"role": turn.role, "content": turn.content} for turn in turns],
            tokenize=False,
            add_generation_prompt=generation_prompt,
        )
        assert isinstance(text, str)
        return text

    def first_refused(self, turns: Sequence[Message]) -> int:
        """Index of the turn at which the template first refuses the growing chat."""
        for i in range(len(turns)):
            if self._skeleton(turns[: i + 1], generation_prompt=False) is None:
                return i
        return len(turns) - 1

    def layout(self, turns: Sequence[Message], text: str, continues: bool) -> ChatLayout | None:
        """Layout of the rendering `text` of `turns`; with `continues` it ends with the last content.

        None where the template rewrites contents other than by trimming white space, drops them or reorders them.
        """
        parts = self._skeleton(turns, generation_prompt=not continues)
        if parts is None or len(parts) != len(turns) + 1:
            return None
        contents = _match(parts, turns, text)
        if contents is None:
            return None
        runs = self._role_runs(turns, parts, contents)
        if continues:
            parts = [*parts[:-1], ""]
        runs = runs or []
        return ChatLayout(tuple(parts), tuple(contents), tuple(s for s, _ in runs), tuple(r for _, r in runs))

    def _skeleton(self, turns: Sequence[Message], generation_prompt: bool) -> list[str] | None:
        """The template's own text around the placeholders of `turns`; None where it refuses them.

        Fewer than len(turns) + 1 parts where it does not render each once and in order.
        """
        placeholders = [Message(turn.role, _placeholder(i)) for i, turn in enumerate(turns)]
        try:
            text = self.render(placeholders, generation_prompt)
        except TemplateError:
            return None
        pieces = _PLACEHOLDER.split(text)
        return pieces[::2] if pieces[1::2] == [str(i) for i in range(len(turns))] else [text]

    def _role_runs(
        self, turns: Sequence[Message], parts: Sequence[str], contents: Sequence[str]
    ) -> list[tuple[int, str]] | None:
        """(start, role) of each run of one role in the text; None where a turn's end cannot be told."""
        footers = self._footers(turns, parts)
        if footers is None:
            return None
        # A content without a turn of its own (a system text inside the first user turn) stands in the next one's.
        frames = [turn.role for turn in turns]
        for i in reversed(range(len(turns) - 1)):
            if footers[i] is None:
                frames[i] = frames[i + 1]
        inserted = self._inserted(turns, parts[0], footers[0] or "")
        if inserted is None:
            return None
        starts = _part_starts(parts, contents)
        runs = [(0, "system")] if inserted else []
        runs.append((inserted, frames[0]))
        for i, turn in enumerate(turns):
            runs.append((starts[i + 1] - len(contents[i]), turn.role))
            footer = footers[i]
            if footer:
                runs.append((starts[i + 1], frames[i]))
            following = frames[i + 1] if i + 1 < len(turns) else "assistant"
            runs.append((starts[i + 1] + len(footer or ""), following))
        return runs

    def _footers(self, turns: Sequence[Message], parts: Sequence[str]) -> list[str | None] | None:
        """Text that closes each turn; None for one that is not rendered until the next is there.

        None as a whole where the template changes the end of a turn once another follows.
        """
        footers: list[str | None] = []
        # The same text after a turn of the same role ends it in the same place: a long chat needs few renderings.
        known: dict[tuple[str, str], str | None] = {}
        for i, turn in enumerate(turns):
            last = i + 1 == len(turns)
            key = (turn.role, parts[i + 1])
            if last or key not in known:
                prefix = self._skeleton(turns[: i + 1], generation_prompt=False)
                known[key] = prefix[-1] if prefix is not None and len(prefix) == i + 2 else None
            footer = known[key]
            if footer is None and last:
                return None
            if footer is not None and not parts[i + 1].startswith(footer):
                return None
            footers.append(footer)
        return footers

    def _inserted(self, turns: Sequence[Message], opening: str, footer: str) -> int | None:
        """Length of a default system text before the first turn, which is what a later turn of its role lacks.

        None where no later turn of that role can be rendered.
        """
        first = turns[0]
        if first.role == "system":
            return 0
        again = self._skeleton([first, first], generation_prompt=False)
        if again is None:
            # Templates that want user and assistant to alternate.
            pair = [first, Message("assistant", "")]
            reply = self._skeleton(pair, generation_prompt=False)
            again = self._skeleton([*pair, first], generation_prompt=False)
            if reply is None or again is None:
                return None
            footer = reply[-1]
        header = again[-2]
        if not header.startswith(footer) or not opening.endswith(header[len(footer) :]):
            return None
        inserted = opening[: len(opening) - len(header) + len(footer)]
        # A token that begins every sequence is no system text, and belongs to the first turn.
        text = inserted
        for token in self._tokenizer.all_special_tokens:
            text = text.replace(token, "")
        return len(inserted) if text.strip() else 0


def _match(parts: Sequence[str], turns: Sequence[Message], text: str) -> list[str] | None:
    """The contents as the template wrote them (with or without the white space around them), or None."""
    if not text.startswith(parts[0]):
        return None
    contents = []
    place = len(parts[0])
    for turn, part in zip(turns, parts[1:], strict=True):
        content = turn.content
        forms = (content, content.strip(), content.lstrip(), content.rstrip())
        written = next((form for form in forms if text.startswith(form + part, place)), None)
        if written is None:
            return None
        contents.append(written)
        place += len(written) + len(part)
    return contents if place == len(text) else None


def _placeholder(index: int) -> str:
    return f"\ue000{index}\ue001"


def _interleave(parts: Sequence[str], contents: Sequence[str]) -> str:
    return "".join(part + content for part, content in zip(parts, [*contents, ""], strict=True))


def _part_starts(parts: Sequence[str], contents: Sequence[str]) -> list[int]:
    """Offset of each part in the text of parts and contents in turn."""
    lengths = (len(part) + len(content) for part, content in zip(parts, contents, strict=False))
    return list(accumulate(lengths, initial=0))
