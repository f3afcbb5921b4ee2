"""What a defect is."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Mutant:
    """`module` is a dotted name, in which `old` occurs once; `tests` are node ids below tests/, the narrowest that must
    go red. `why` says what the defect does."""

    name: str
    module: str
    old: str
    new: str
    why: str
    tests: tuple[str, ...]
