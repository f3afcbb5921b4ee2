"""This module finds where the turns of a chat and their contents lie in the text that a chat template renders.

The template is rendered once more with a placeholder for every content, which gives the skeleton; the text between the
placeholders is the template's own. footers.py tells where in it a turn ends. The whole costs as many renderings of
messages as there are messages, times a constant.
"""

import re
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate

from jinja2 import TemplateError, TemplateSyntaxError
from transformers import PreTrainedTokenizerBase

from patchclamp_server.errors import FailedPrecondition
from patchclamp_server.model.tokenizer import template_of
from patchclamp_server.text.footers import Footers
from patchclamp_server.text.text_threads import check_awaited

_FIELD = "prompt.chat"
# Roles to put between two turns of one role: some templates join turns in a row, others want roles to alternate.
_BETWEEN: tuple[tuple[str, ...], ...] = ((), ("assistant",), ("user",))
# The placeholder is made of private-use characters, which templates neither trim as white space nor look for.
_PLACEHOLDER = re.compile("\ue000([0-9]+)\ue001")


@dataclass(frozen=True)
class Message:
    role: str
    content: str


@dataclass(frozen=True)
class RenderedChat:
    """The rendered text is parts[0] contents[0] … contents[n-1] parts[n]; the parts are the template's own text."""

    parts: tuple[str, ...]
    contents: tuple[str, ...]
    # The start of each run of one role, and the roles; both are empty where the template does not tell turns apart.
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
        """Returns the role of a token by its first character (of a token without characters, by its place)."""
        assert start <= end
        return self.roles[bisect_right(self.starts, start) - 1]

    def content_at(self, start: int, end: int) -> int | None:
        """Returns the index of the first content that characters [start, end) of the text overlap."""
        # Content k ends where part k + 1 starts, so the first one that ends after `start` is the one to look at.
        k = bisect_right(self._text_starts, start, lo=1) - 1
        return k if k < len(self.contents) and self._text_starts[k + 1] - len(self.contents[k]) < end else None

    def from_skeleton(self, offset: int) -> int:
        """Maps an offset in one of the template's own parts of the skeleton to the offset in the text."""
        part = bisect_right(self._skeleton_starts, offset) - 1
        return offset - self._skeleton_starts[part] + self._text_starts[part]

    @cached_property
    def _text_starts(self) -> list[int]:
        return _part_starts(self.parts, self.contents)

    @cached_property
    def _skeleton_starts(self) -> list[int]:
        return _part_starts(self.parts, [_placeholder(i) for i in range(len(self.contents))])


class ChatTemplate:
    """This is the chat template of a tokenizer.

    Renderings raise jinja2.TemplateError where the template refuses, and FailedPrecondition where it fails.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self._tokenizer = tokenizer

    @classmethod
    def of(cls, tokenizer: PreTrainedTokenizerBase, model: str) -> "ChatTemplate":
        """Raises FailedPrecondition where the model has no template that a chat alone chooses."""
        if not template_of(tokenizer):
            named = tokenizer.chat_template if isinstance(tokenizer.chat_template, dict) else {}
            which = f"only chat templates named {', '.join(named)} and no default" if named else "no chat template"
            raise FailedPrecondition(_FIELD, f"{model} has {which}; send text or tokens")
        return cls(tokenizer)

    def render(self, turns: Sequence[Message], generation_prompt: bool) -> str:
        check_awaited()
        try:
            text = self._tokenizer.apply_chat_template(
                [{"role": turn.role, "content": turn.content} for turn in turns],
                tokenize=False,
                add_generation_prompt=generation_prompt,
            )
        except TemplateSyntaxError as error:
            raise FailedPrecondition(_FIELD, f"the model's chat template is no template: {error}") from error
        except TemplateError:
            raise
        # A template is a program of the model's author, which may raise whatever Python does.
        except Exception as error:
            raise FailedPrecondition(
                _FIELD, f"the model's chat template failed: {type(error).__name__}: {error}"
            ) from error
        assert isinstance(text, str)
        return text

    def first_refused(self, turns: Sequence[Message]) -> int:
        """Returns the index of a turn with which the template refuses the growing chat, and without it does not."""
        roles = [turn.role for turn in turns]
        accepted, refused = 0, len(turns)
        while refused - accepted > 1:
            middle = (accepted + refused) // 2
            if self._skeleton(roles[:middle]) is None:
                refused = middle
            else:
                accepted = middle
        return refused - 1

    def parse(self, turns: Sequence[Message], text: str, continues: bool) -> RenderedChat | None:
        """Parses the rendering `text` of `turns`; with `continues` the text ends with the last content.

        Returns None where the template drops or reorders contents, or rewrites them other than by trimming white space.
        """
        parts = self._skeleton([turn.role for turn in turns], generation_prompt=not continues)
        if parts is None or len(parts) != len(turns) + 1:
            return None
        contents = _match(parts, turns, text)
        if contents is None:
            return None
        runs = self._role_runs(turns, parts, contents)
        if continues:
            parts = [*parts[:-1], ""]
        runs = runs or []
        return RenderedChat(tuple(parts), tuple(contents), tuple(s for s, _ in runs), tuple(r for _, r in runs))

    def _skeleton(self, roles: Sequence[str], generation_prompt: bool = False) -> list[str] | None:
        """Returns the template's own text around placeholders for the contents; None where it refuses or fails.

        There are fewer than len(roles) + 1 parts where it does not render each placeholder once and in order.
        """
        placeholders = [Message(role, _placeholder(i)) for i, role in enumerate(roles)]
        try:
            text = self.render(placeholders, generation_prompt)
        except (TemplateError, FailedPrecondition):
            return None
        pieces = _PLACEHOLDER.split(text)
        return pieces[::2] if pieces[1::2] == [str(i) for i in range(len(roles))] else [text]

    def _role_runs(
        self, turns: Sequence[Message], parts: Sequence[str], contents: Sequence[str]
    ) -> list[tuple[int, str]] | None:
        """Returns (start, role) of each run of one role in the text; None where a turn's end cannot be told."""
        # A content without a turn of its own (a system text inside the first user turn) belongs to the next one's turn.
        frames = [turn.role for turn in turns]
        footers = Footers(self._skeleton, tuple(frames), parts).found()
        if footers is None:
            return None
        for i in reversed(range(len(turns) - 1)):
            if footers[i] is None:
                frames[i] = frames[i + 1]
        inserted = self._inserted(turns[0].role, parts[0])
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

    def _inserted(self, role: str, opening: str) -> int | None:
        """Returns the length of a default system text before the first turn, which a later turn of its role lacks.

        Returns None where no later turn of that role is rendered as the first one is.
        """
        if role == "system":
            return 0
        headers = (self._later_header(role, between) for between in _BETWEEN)
        header = next((found for found in headers if found is not None and opening.endswith(found)), None)
        if header is None:
            return None
        inserted = opening.removesuffix(header)
        # A token that begins every sequence is not a system text, and belongs to the first turn.
        text = inserted
        for token in self._tokenizer.all_special_tokens:
            text = text.replace(token, "")
        return len(inserted) if text.strip() else 0

    def _later_header(self, role: str, between: Sequence[str]) -> str | None:
        """Returns what the template writes before a second turn of a role, with turns of other roles in between."""
        before = self._skeleton([role, *between])
        after = self._skeleton([role, *between, role])
        if before is None or after is None or len(after) != len(between) + 3 or not after[-2].startswith(before[-1]):
            return None
        return after[-2].removeprefix(before[-1])


def _match(parts: Sequence[str], turns: Sequence[Message], text: str) -> list[str] | None:
    """Returns the contents as the template wrote them (with or without the white space around them), or None."""
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
    """Returns the offset of each part in the text in which parts and contents alternate."""
    lengths = (len(part) + len(content) for part, content in zip(parts, contents, strict=False))
    return list(accumulate(lengths, initial=0))
