"""Which tokens: ``generated()``, ``role("user") & last(4)``, ``(prompt() | tokens([7])).except_(positions(0, 1))``.

The scopes without arguments can be written as words: "all", "prompt", "generated".
"""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Literal

from patchclamp.fields import build, build_as, shown
from patchclamp.v1 import program_pb2 as pb

ScopeName = Literal["all", "prompt", "generated"]


@dataclass(frozen=True)
class Scope:
    """Holds the tokens that match any of `include` (none: every token) and none of `exclude`.

    The messages are not changed.
    """

    include: tuple[pb.TokenSelector, ...] = ()
    exclude: tuple[pb.TokenSelector, ...] = ()

    def __and__(self, other: "ScopeLike") -> "Scope":
        """Selects the tokens in both. Raises ValueError when one field would need two values."""
        other = scope_of(other)
        if self.include and other.include:
            include = tuple(_both(a, b) for a in self.include for b in other.include)
        else:
            include = self.include or other.include
        return Scope(include, self.exclude + other.exclude)

    def __or__(self, other: "ScopeLike") -> "Scope":
        """Selects the tokens in either. Raises ValueError when either excludes tokens: exclude after the union."""
        other = scope_of(other)
        if self.exclude or other.exclude:
            raise ValueError("apply except_ to the union: (a | b).except_(c)")
        if not self.include or not other.include:
            return everything()
        return Scope(self.include + other.include)

    def except_(self, other: "ScopeLike") -> "Scope":
        """Selects the tokens in this scope that are not in `other`.

        Raises ValueError when `other` itself excludes tokens or is all.
        """
        other = scope_of(other)
        if other.exclude:
            raise ValueError("the excluded scope cannot exclude tokens itself")
        if not other.include:
            raise ValueError("excluding every token leaves none")
        return Scope(self.include, self.exclude + other.include)

    def message(self) -> pb.Scope:
        return pb.Scope(include=self.include, exclude=self.exclude)


ScopeLike = Scope | ScopeName


def everything() -> Scope:
    """Selects every token; ``everything().except_(...)`` starts with it."""
    return Scope()


def prompt() -> Scope:
    """Selects the tokens that the client sent."""
    return Scope((pb.TokenSelector(phase=pb.PHASE_PROMPT),))


def generated() -> Scope:
    """Selects the tokens that the model produced (for score: the continuation)."""
    return Scope((pb.TokenSelector(phase=pb.PHASE_GENERATED),))


def positions(start: int, end: int | None = None) -> Scope:
    """Selects start ≤ position < end; negative numbers count from the end of the prompt (-1 is its last token)."""
    return Scope((pb.TokenSelector(positions=build(pb.PositionRange, start=start, end=end)),))


def last(k: int) -> Scope:
    """Selects the last k tokens of the prompt."""
    selector = build_as({"last_k": "k"}, pb.TokenSelector, last_k=k)
    if not selector.last_k:
        raise ValueError("last(k) needs k of at least 1")
    return Scope((selector,))


def tokens(ids: Iterable[int]) -> Scope:
    """Selects the tokens with one of these ids."""
    selector = build_as({"token_ids": "ids"}, pb.TokenSelector, token_ids=ids)
    if not selector.token_ids:
        raise ValueError("tokens(ids) needs at least one id")
    return Scope((selector,))


def role(name: str) -> Scope:
    """Selects the tokens of the chat turns of this role, for requests with messages."""
    selector = build_as({"role": "name"}, pb.TokenSelector, role=name)
    if not selector.role:
        raise ValueError("role(name) needs a name")
    return Scope((selector,))


_NAMED: Mapping[str, Callable[[], Scope]] = {"all": everything, "prompt": prompt, "generated": generated}


def scope_of(scope: ScopeLike, field: str = "scope") -> Scope:
    """Returns the scope, or the one with this name.

    Raises ValueError, which lists the names, for another name and TypeError for anything else.
    """
    if isinstance(scope, Scope):
        return scope
    names = ", ".join(map(repr, _NAMED))
    if not isinstance(scope, str):
        raise TypeError(f"{field}: expected {names} or a scope such as generated() or last(4), got {shown(scope)}")
    if scope not in _NAMED:
        raise ValueError(f"{field} {scope!r} is unknown; accepted: {names}, or a scope such as last(4)")
    return _NAMED[scope]()


def scope_message(scope: ScopeLike | None) -> pb.Scope | None:
    """Returns the message of a scope. None stays None: the default of the field, which is every token."""
    return None if scope is None else scope_of(scope).message()


def _both(a: pb.TokenSelector, b: pb.TokenSelector) -> pb.TokenSelector:
    merged = pb.TokenSelector()
    merged.CopyFrom(a)
    for field, value in b.ListFields():
        if (field.name, value) not in ((f.name, v) for f, v in a.ListFields()):
            if any(f.name == field.name for f, _ in a.ListFields()):
                raise ValueError(f"one selector cannot hold two values of {field.name}")
            merged.MergeFrom(pb.TokenSelector(**{field.name: value}))
    return merged
