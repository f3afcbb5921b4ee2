"""What is served as it was asked for, though it can hardly have been meant: told in receipts, and counted."""

from dataclasses import dataclass
from enum import Enum


class WarningCode(Enum):
    """The value is the label in metrics."""

    STRONG_EDIT = "strong_edit"
    BEYOND_CONTEXT = "beyond_context"


@dataclass(frozen=True)
class RequestWarning:
    """`field`: path in the request, as in errors."""

    code: WarningCode
    field: str
    message: str
