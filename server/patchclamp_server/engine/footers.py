"""Where each turn of a chat ends in the text that a template renders.

The footer of turn i is what a chat that ends with turn i ends with, and the text between the contents of turns i and
i + 1 begins with it. Rendering every messages[:i] would take quadratic work, so a turn is looked at in the shortest
chat that shows it: alone, after the turn before it, or in its place. A short chat shows it when the same chat and the
turn that follows have the very text between the two that the whole chat has. Turns of a role with the same text behind
them end alike.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

# Turns that are looked at in their places, each of which renders all turns before it.
MOST_IN_PLACE = 8
# Turns that are looked at in short chats: those that show nothing, as where a template numbers its turns, and all.
MOST_IN_VAIN = 8
MOST_IN_SHORT_CHATS = 4096

# The template's own text around the contents of turns of these roles; None where it refuses them.
Skeleton = Callable[[Sequence[str]], list[str] | None]


@dataclass(frozen=True)
class Found:
    """`text` None: a turn that is not rendered until the next one is there."""

    text: str | None


class Footers:
    """`roles`: of the turns; `parts`: their skeleton, len(roles) + 1 of them."""

    def __init__(self, skeleton: Skeleton, roles: Sequence[str], parts: Sequence[str]) -> None:
        self._skeleton = skeleton
        self._roles = roles
        self._parts = parts
        self._known: dict[tuple[str, str], Found] = {}
        self._of_role: dict[str, set[Found]] = {}
        self._in_place = self._in_vain = self._in_short_chats = 0

    def found(self) -> list[str | None] | None:
        """The footer of each turn, see Found. None as a whole where they cannot be told, as the template changes the
        end of a turn once another follows."""
        footers: list[str | None] = []
        for i in range(len(self._roles)):
            found = self._footer(i)
            if found is None or (found.text is not None and not self._parts[i + 1].startswith(found.text)):
                return None
            footers.append(found.text)
        # The last turn has nothing behind it that it could be rendered with.
        return None if footers[-1] is None else footers

    def _footer(self, i: int) -> Found | None:
        role = self._roles[i]
        if i + 1 == len(self._roles):
            return self._ending(self._roles)
        if self._roles[i + 1] == role:
            # Both are of one role, so where between them one ends changes nothing; templates may join them.
            return Found("")
        key = (role, self._parts[i + 1])
        if key not in self._known:
            found = self._in_short_chat(i) or self._in_its_place(i) or self._as_others(i)
            if found is None:
                return None
            self._known[key] = found
            self._of_role.setdefault(role, set()).add(found)
        return self._known[key]

    def _in_short_chat(self, i: int) -> Found | None:
        if self._in_vain >= MOST_IN_VAIN or self._in_short_chats >= MOST_IN_SHORT_CHATS:
            return None
        self._in_short_chats += 1
        for start in dict.fromkeys((i, max(0, i - 1))):
            whole = self._skeleton(self._roles[start : i + 2])
            if whole is not None and len(whole) == i - start + 3 and whole[-2] == self._parts[i + 1]:
                return self._ending(self._roles[start : i + 1])
        self._in_vain += 1
        return None

    def _in_its_place(self, i: int) -> Found | None:
        if self._in_place >= MOST_IN_PLACE:
            return None
        self._in_place += 1
        return self._ending(self._roles[: i + 1])

    def _as_others(self, i: int) -> Found | None:
        """As the turns of its role end that were looked at, where those all end alike."""
        of_role = self._of_role.get(self._roles[i], set())
        return next(iter(of_role)) if len(of_role) == 1 else None

    def _ending(self, roles: Sequence[str]) -> Found:
        parts = self._skeleton(roles)
        return Found(parts[-1] if parts is not None and len(parts) == len(roles) + 1 else None)
