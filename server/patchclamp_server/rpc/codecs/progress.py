"""Turns the progress of a job into a response of its stream."""

from typing import Any, TypeVar

from google.protobuf.message import Message

from patchclamp_server.analysis.progress import Progress

R = TypeVar("R", bound=Message)


def encode_progress(progress: Progress, response: type[R]) -> R:
    """Returns a response with its field `progress` set, a message of `stage`, `done` and `total`."""
    counts: Any = {"stage": progress.stage, "done": progress.done, "total": progress.total}
    return response(progress=counts)
