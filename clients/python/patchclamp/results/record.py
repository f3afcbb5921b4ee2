"""Base of the results: plain data for --json."""

from dataclasses import asdict, dataclass
from typing import Any


@dataclass(frozen=True)
class Record:
    """A frozen dataclass that can be written as JSON."""

    def to_dict(self) -> dict[str, Any]:
        """Nested dicts, lists, strings and numbers."""
        return asdict(self)
