"""Where each turn of a chat ends in the text that a template renders.

The footer of turn i is what a chat that ends with turn i ends with, and the text between the contents of turns i and
i + 1 begins with it. Rendering every messages[:i] would take quadratic work, so a turn is looked at in the shortest
chat that shows it: alone, after the turn before it, or in its place. A short chat shows it when the same chat and the
turn that follows have the very text between the two that the whole chat has. Turns of a role with the same text behind
them end alike.
"""

from collections.abc import Callable, Sequence

# Turns that are looked at in their places, each of which renders all turns before it.
MOST_IN_PLACE = 8
# Far more than a chat has kinds of turns.
MOST_IN_SHORT_CHATS = 4096

# The template's own text around the contents of turns of these roles; None where it refuses them.
Skeleton = Callable[[Sequence[str]], list[str] | None]


class Footers:
    """`roles`: of the turns; `parts`: their skeleton, len(roles) + 1 of them."""

    def __init__(self, skeleton: Skeleton, roles: Sequence[str], parts: Sequence[str]) -> None:
        self._skeleton = skeleton
        self._roles = roles
        self._parts = parts
        self._known: dict[tuple[str, str], str | None] = {}
        self._in_place = 0

    def found(self) -> list[str | None] | None:
        """The footer of each turn; None for one that is not rendered until the next is there.

        None as a whole where they cannot be told: where the template changes the end of a turn once another follows,
        or has too many ends to look at.
        """
        footers: list[str | None] = []
        for i, (role, following) in enumerate(zip(self._roles, self._roles[1:], strict=False)):
            # Where between two turns of one role the first one ends changes nothing; templates may join them.
            footer = "" if role == following else self._footer(i)
            if footer is not None and not self._parts[i + 1].startswith(footer):
                return None
            footers.append(footer)
            if self._in_place > MOST_IN_PLACE or len(self._known) > MOST_IN_SHORT_CHATS:
                return None
        last = self._ending(self._roles)
        return [*footers, last] if last is not None and self._parts[-1].startswith(last) else None

    def _footer(self, i: int) -> str | None:
        key = (self._roles[i], self._parts[i + 1])
        if key not in self._known:
            self._known[key] = self._ending(self._roles[self._shown_from(i) : i + 1])
        return self._known[key]

    def _shown_from(self, i: int) -> int:
        """Turn at which the shortest chat begins that shows how turn i ends."""
        for start in dict.fromkeys((i, max(0, i - 1))):
            parts = self._skeleton(self._roles[start : i + 2])
            if parts is not None and len(parts) == i - start + 3 and parts[-2] == self._parts[i + 1]:
                return start
        self._in_place += 1
        return 0

    def _ending(self, roles: Sequence[str]) -> str | None:
        parts = self._skeleton(roles)
        return parts[-1] if parts is not None and len(parts) == len(roles) + 1 else None
