"""Turns seconds into messages."""

from google.protobuf.duration_pb2 import Duration
from google.protobuf.timestamp_pb2 import Timestamp


def timestamp(seconds: float) -> Timestamp:
    """Returns the moment `seconds` after the epoch."""
    stamp = Timestamp()
    stamp.FromNanoseconds(round(seconds * 1e9))
    return stamp


def duration(seconds: float) -> Duration:
    """Returns a span of so many seconds."""
    span = Duration()
    span.FromNanoseconds(round(seconds * 1e9))
    return span
