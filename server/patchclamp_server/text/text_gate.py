"""Every text passes this gate on its way to tokens: a prompt, a continuation, an answer, a document of a job.

The gate makes sure that the text is not longer than what may be read, that its call still waits for it, and that the
model has a row for every id.
"""

from collections.abc import Callable

from patchclamp_server.errors import InvalidArgument
from patchclamp_server.model.info import ModelInfo
from patchclamp_server.text.encoders import Encoders, Tokens
from patchclamp_server.text.text_threads import check_awaited
from patchclamp_server.text.vocabulary import first_outside

# A token has fewer bytes than this on average in almost any text.
USUAL_BYTES = 8
# A long text is looked at in pieces of so many characters.
PIECE_CHARACTERS = 1 << 15


class TextGate:
    """Checks texts, and raises InvalidArgument with the field of one that does not pass."""

    def __init__(self, encoders: Encoders, info: ModelInfo) -> None:
        self._encoders = encoders
        self._info = info

    def bytes_of(self, tokens: int) -> int:
        """Returns the most bytes of text that so many tokens may be read from: tokens · bytes of the longest token."""
        return tokens * self._encoders.longest_token

    def tokens(
        self,
        read: Callable[[str], Tokens],
        text: str,
        field: str,
        most_tokens: int | None = None,
        *,
        field_at: Callable[[int, int], str] | None = None,
    ) -> Tokens:
        """Returns what `read` makes of a text. At most `most_tokens` are read, by default the context; `field_at` names
        the field of characters [start, end), where `field` is made of several."""
        check_awaited()
        self._check_length(text, field, most_tokens or self._info.context_length)
        found = read(text)
        size = self._info.vocab_size
        outside = first_outside(found.ids, size)
        if outside is not None:
            id, (start, end) = found.ids[outside], found.spans[outside]
            written = text[start:end] or self._encoders.start.id_to_token(id)
            raise InvalidArgument(
                field if field_at is None else field_at(start, end),
                f"{written!r} is the token {id} of the tokenizer, outside the vocabulary [0, {size}) of the model",
            )
        return found

    def check_bytes(self, size: int, field: str, tokens: int) -> None:
        """Refuses a text of more bytes than so many tokens can have."""
        most = self.bytes_of(tokens)
        if size > most:
            raise InvalidArgument(field, f"has {size} bytes; at most {most} are read, for {tokens} tokens")

    def _check_length(self, text: str, field: str, tokens: int) -> None:
        size = len(text.encode())
        self.check_bytes(size, field, tokens)
        if size <= max(USUAL_BYTES * tokens, PIECE_CHARACTERS):
            return
        # Tokenising cannot be interrupted, so a text that is likely too long is counted in pieces first. A piece has
        # many tokens, and a cut costs a few.
        counted = 0
        for start in range(0, len(text), PIECE_CHARACTERS):
            check_awaited()
            counted += len(self._encoders.at_start(text[start : start + PIECE_CHARACTERS]).ids)
            if counted > 2 * tokens:
                raise InvalidArgument(field, f"has far more than the {tokens} tokens that are read")
