"""Footers tell where each turn of a chat ends in the text that a template renders.

The footer of turn i is the text with which a chat that ends with turn i ends; the text between the contents of turns i
and i + 1 begins with it. Rendering every messages[:i] would take quadratic work, so a turn is looked at in the shortest
chat that shows it: alone, after the turn before it, or in its place. A short chat shows it when the text between the
turn and the next one is the same as in the whole chat. Turns of a role with the same text behind them end alike.
"""

from collections.abc import Callable, Sequence

# At most this many turns are looked at in their places, which renders all turns before each.
MOST_IN_PLACE = 8
# This is far more than the kinds of turns that a chat has.
MOST_IN_SHORT_CHATS = 4096

# Returns the template's own text around the contents of turns of these roles; None where it refuses them.
Skeleton = Callable[[Sequence[str]], list[str] | None]


class Footers:
    """`roles` are those of the turns; `parts` is their skeleton and has len(roles) + 1 entries."""

    def __init__(self, skeleton: Skeleton, roles: Sequence[str], parts: Sequence[str]) -> None:
        self._skeleton = skeleton
        self._roles = roles
        self._parts = parts
        self._known: dict[tuple[str, str], str | None] = {}
        self._in_place = 0

    def found(self) -> list[str | None] | None:
        """Returns the footer of each turn; None for one that is not rendered until the next is there.

        Returns None as a whole where the footers cannot be told: where the template changes the end of a turn once
        another follows, or has too many ends to look at.
        """
        footers: list[str | None] = []
        for i, (role, following) in enumerate(zip(self._roles, self._roles[1:], strict=False)):
            # It does not matter where the first of two turns of one role ends; templates may join them.
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
        """Returns the turn at which the shortest chat begins that shows how turn i ends."""
        for start in dict.fromkeys((i, max(0, i - 1))):
            parts = self._skeleton(self._roles[start : i + 2])
            if parts is not None and len(parts) == i - start + 3 and parts[-2] == self._parts[i + 1]:
                return start
        self._in_place += 1
        return 0

    def _ending(self, roles: Sequence[str]) -> str | None:
        parts = self._skeleton(roles)
        return parts[-1] if parts is not None and len(parts) == len(roles) + 1 else None
