"""How large a message may be that a client gets."""

from google.protobuf.message import Message

from patchclamp_server.errors import InvalidArgument

# What a gRPC client accepts unless it was told otherwise.
CLIENT_MESSAGE_BYTES = 4 * 1024 * 1024


def within_a_message(answer: Message, field: str, advice: str) -> None:
    """A client accepts an answer of this size. `advice`: how to ask for less, in the field `field`."""
    size = answer.ByteSize()
    if size > CLIENT_MESSAGE_BYTES:
        raise InvalidArgument(field, f"the answer has {size} bytes, above {CLIENT_MESSAGE_BYTES}: {advice}")
