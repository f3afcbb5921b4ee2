"""Warnings about requests served as asked that can hardly be meant: receipts tell them, and metrics count them."""

from dataclasses import dataclass
from enum import Enum


class WarningCode(Enum):
    """The value is the label in metrics."""

    STRONG_EDIT = "strong_edit"
    BEYOND_CONTEXT = "beyond_context"
    BEYOND_SAFE_RANGE = "beyond_safe_range"
    BELOW_JUMP = "below_jump"


@dataclass(frozen=True)
class RequestWarning:
    """A warning; `field` is the path in the request, as in errors."""

    code: WarningCode
    field: str
    message: str
