"""The output of a sequence: text that is final, readouts, and why it ended."""

from collections.abc import Callable
from dataclasses import dataclass, field

from patchclamp_server.engine.request import Event, FinishReason, Readouts, StopParams, Text
from patchclamp_server.interventions.program import ReadoutValue
from patchclamp_server.text.detokenize import IncrementalDetokenizer, StopChecker


@dataclass(eq=False)
class Output:
    """Turns tokens into text events, and finds the stop conditions that depend on them."""

    detokenizer: IncrementalDetokenizer
    stops: StopChecker
    eos_token_ids: frozenset[int]
    stop_string: str = ""
    readouts: dict[int, list[ReadoutValue]] = field(default_factory=dict)

    def push(self, token: int, count: int, stop: StopParams, emit: Callable[[Event], None]) -> FinishReason | None:
        """Emits the text of one more token, the `count`-th; returns the reason when it ends the sequence. A stop token
        adds no text."""
        if token in stop.token_ids:
            return FinishReason.STOP_TOKEN
        if token in self.eos_token_ids:
            return FinishReason.EOS
        text = self.detokenizer.push(token)
        if self.stops.strings and count > stop.min_tokens:
            result = self.stops.push(text)
            text, self.stop_string = result.text_to_emit, result.matched or ""
        if text:
            emit(Text(text))
        return FinishReason.STOP_STRING if self.stop_string else None

    def flush(self, emit: Callable[[Event], None]) -> None:
        """Emits text that was held back as a possible stop string or an unfinished character."""
        if self.stop_string:
            return
        result = self.stops.push(self.detokenizer.flush())
        text = result.text_to_emit + (self.stops.flush() if result.matched is None else "")
        if text:
            emit(Text(text))

    def collect(self, value: ReadoutValue) -> None:
        self.readouts.setdefault(value.position, []).append(value)

    def emit_readouts(self, emit: Callable[[Event], None]) -> None:
        for position in sorted(self.readouts):
            emit(Readouts(position, tuple(self.readouts[position])))
        self.readouts.clear()
