"""Turns engine events into GenerateResponse messages, as few as fit."""

from collections.abc import Callable, Iterable, Iterator, Sequence

from patchclamp.v1 import generation_pb2 as pb
from patchclamp.v1 import program_pb2
from patchclamp_server.engine.request import (
    Event,
    Failed,
    Finished,
    LatentPredictions,
    PromptToken,
    Readouts,
    Text,
    Token,
)
from patchclamp_server.interventions.program import ReadoutValue
from patchclamp_server.interventions.request_warnings import RequestWarning
from patchclamp_server.rpc.call.confidence import AnswerConfidence
from patchclamp_server.rpc.call.grounding import GroundedTokens
from patchclamp_server.rpc.codecs.confidence import encode_confidence
from patchclamp_server.rpc.codecs.generation import encode_finished, encode_grounding, encode_source, encode_token
from patchclamp_server.rpc.codecs.program import encode_readout_value, encode_warning

# A response is closed once it is this large, because clients refuse messages above 4 MiB by default.
RESPONSE_BYTES = 1 << 20
# This bounds the bytes of a message besides its arrays; it is generous.
OVERHEAD_BYTES = 64


class ResponseBuilder:
    """Turns each batch of events into responses; keeps what must wait for a later event.

    The readouts at a token come out of the forward pass over it, one step after the token was chosen. With
    `wait_for_readouts` a token waits for them (its text does not), so that both arrive together. Without it, as in a
    lockstep session where that step needs the client's next Advance, they ride on the next token; every value names
    its own position. With `grounded`, tokens carry their sources, which are known before the tokens. `confidence`
    makes the report of the last response. `warnings` go with the first response. `piece` gives the text
    of a token; the values of `token_readouts` get it for their ids.
    """

    def __init__(
        self,
        prompt_tokens: int,
        *,
        wait_for_readouts: bool,
        piece: Callable[[int], str],
        token_readouts: frozenset[str] = frozenset(),
        grounded: GroundedTokens | None = None,
        confidence: AnswerConfidence | None = None,
        warnings: Sequence[RequestWarning] = (),
    ) -> None:
        self._prompt_tokens = prompt_tokens
        self._wait = wait_for_readouts
        self._piece = piece
        self._token_readouts = token_readouts
        self._grounded = grounded
        self._confidence = confidence
        self._response = pb.GenerateResponse(warnings=[encode_warning(w) for w in warnings])
        self._bytes = 0
        self._held: pb.GeneratedToken | None = None
        self._late: list[program_pb2.ReadoutValue] = []  # these are values whose token is already on its way

    def responses(self, events: Iterable[Event]) -> Iterator[pb.GenerateResponse]:
        """Yields responses for a batch of events. Raises the error of a Failed event, after what came before it."""
        for event in events:
            match event:
                case Text(text):
                    self._response.text += text
                    self._bytes += len(text.encode())
                case Token():
                    self._add_token(event)
                case PromptToken():
                    self._response.prompt_tokens.append(encode_token(event, self._piece))
                    self._bytes += OVERHEAD_BYTES + self._response.prompt_tokens[-1].ByteSize()
                case Readouts(position, values):
                    own = values if self._grounded is None else self._grounded.take(values)
                    self._add_readouts(position, [self._encoded(v) for v in own])
                case LatentPredictions():
                    assert self._confidence is not None
                    self._confidence.add(event)
                case Finished():
                    self._release()
                    self._response.prompt_readouts.extend(self._late)
                    self._response.finished.CopyFrom(encode_finished(event))
                    if self._grounded is not None:
                        self._response.finished.grounding.CopyFrom(encode_grounding(self._grounded.report()))
                    if self._confidence is not None:
                        self._response.finished.confidence.CopyFrom(encode_confidence(self._confidence.report()))
                    yield self._take()
                case Failed(error):
                    self._release()
                    if self._bytes:
                        yield self._take()
                    raise error
                case _:
                    raise TypeError(f"{type(event).__name__} is no event of a generation")
            if self._bytes >= RESPONSE_BYTES:
                yield self._take()
        if self._bytes:
            yield self._take()

    def _add_token(self, token: Token) -> None:
        self._release()
        message = encode_token(token, self._piece)
        if self._grounded is not None:
            message.sources.extend(encode_source(s) for s in self._grounded.sources(token.position, token.id))
        message.readouts.extend(self._late)
        self._late.clear()
        self._held = message
        if not self._wait:
            self._release()

    def _add_readouts(self, position: int, values: list[program_pb2.ReadoutValue]) -> None:
        if position < self._prompt_tokens:
            self._response.prompt_readouts.extend(values)
            self._bytes += sum(OVERHEAD_BYTES + v.ByteSize() for v in values)
        elif self._held is not None and self._held.position == position:
            self._held.readouts.extend(values)
        else:
            self._late.extend(values)

    def _encoded(self, value: ReadoutValue) -> program_pb2.ReadoutValue:
        texts = map(self._piece, value.ids) if value.name in self._token_readouts else ()
        return encode_readout_value(value, texts)

    def _release(self) -> None:
        if self._held is not None:
            self._response.tokens.append(self._held)
            self._bytes += OVERHEAD_BYTES + self._held.ByteSize()
            self._held = None

    def _take(self) -> pb.GenerateResponse:
        response, self._response, self._bytes = self._response, pb.GenerateResponse(), 0
        return response
