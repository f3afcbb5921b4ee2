"""Bounds the size of a message that a client gets."""

from google.protobuf.message import Message

from patchclamp_server.errors import InvalidArgument

# A gRPC client accepts so much unless it was told otherwise.
CLIENT_MESSAGE_BYTES = 4 * 1024 * 1024


def within_a_message(answer: Message, field: str, advice: str) -> None:
    """Raises InvalidArgument, naming `field`, for an answer larger than a client accepts. `advice`: how to get less."""
    size = answer.ByteSize()
    if size > CLIENT_MESSAGE_BYTES:
        raise InvalidArgument(field, f"the answer has {size} bytes, above {CLIENT_MESSAGE_BYTES}: {advice}")
