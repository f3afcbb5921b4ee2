"""Results of Generate, Session and Score."""

from dataclasses import dataclass, field, replace

from patchclamp.results.confidence import ConfidenceReport
from patchclamp.results.grounding import CopySource, GroundingReport
from patchclamp.results.receipts import ReadoutValue, Receipt, RequestWarning
from patchclamp.results.record import Record
from patchclamp.results.sparsity import SparsityReport
from patchclamp.v1 import generation_pb2 as pb


@dataclass(frozen=True)
class TokenLogprob(Record):
    """Holds a token that could have been chosen."""

    id: int
    text: str
    logprob: float


@dataclass(frozen=True)
class Token(Record):
    """Holds one token; `position` counts the prompt. Log-probabilities are natural, and None when not asked for.

    text: the text of the token by itself, with U+FFFD for bytes that are no whole character.
    sources: with grounding, the prompt positions it was copied from, most probable first.
    """

    id: int
    text: str
    position: int
    logprob: float | None
    top_logprobs: tuple[TokenLogprob, ...]
    readouts: tuple[ReadoutValue, ...]
    sources: tuple[CopySource, ...] = ()


@dataclass(frozen=True)
class Usage(Record):
    prompt_tokens: int
    cached_prompt_tokens: int
    generated_tokens: int
    time_to_first_token_seconds: float
    total_seconds: float
    preemptions: int

    def __str__(self) -> str:
        cached = f" ({self.cached_prompt_tokens} cached)" if self.cached_prompt_tokens else ""
        return (
            f"{self.prompt_tokens} prompt tokens{cached}, {self.generated_tokens} generated, "
            f"first after {self.time_to_first_token_seconds:.2f} s, all in {self.total_seconds:.2f} s"
        )


@dataclass(frozen=True)
class Finished(Record):
    """Says how a stream ended: "eos", "stop_string", "stop_token", "length" or "client".

    sparsity, grounding, confidence: None unless the request asked for them.
    """

    reason: str
    stop_string: str
    receipt: Receipt
    usage: Usage
    seed: int
    sparsity: SparsityReport | None = None
    grounding: GroundingReport | None = None
    confidence: ConfidenceReport | None = None


@dataclass(frozen=True)
class Chunk(Record):
    """Holds one message of a stream. `text` is final; `finished` is set on the last one.

    warnings: on the first one, what was known before the first token; the receipt has all.
    prompt_tokens: with prompt_logprobs, the tokens of the prompt.
    sample: whose message it is, where several samples are drawn.
    """

    text: str
    tokens: tuple[Token, ...]
    prompt_readouts: tuple[ReadoutValue, ...]
    finished: Finished | None
    warnings: tuple[RequestWarning, ...] = ()
    sample: int = 0
    prompt_tokens: tuple[Token, ...] = ()


@dataclass(frozen=True)
class GenerateResult(Record):
    """Holds a whole generation. Send `seed` again to repeat the sample.

    sparsity, grounding, confidence: None unless the request asked for them.
    prompt_tokens: with prompt_logprobs, the tokens of the prompt; the first has no log-probability.
    others: the samples after this first one, where several were drawn.
    """

    text: str
    tokens: tuple[Token, ...]
    finish_reason: str
    stop_string: str
    receipt: Receipt
    usage: Usage
    seed: int
    prompt_readouts: tuple[ReadoutValue, ...] = ()
    sparsity: SparsityReport | None = None
    grounding: GroundingReport | None = None
    confidence: ConfidenceReport | None = None
    others: "tuple[GenerateResult, ...]" = ()
    prompt_tokens: tuple[Token, ...] = ()

    @property
    def readouts(self) -> tuple[ReadoutValue, ...]:
        """All readouts: those of the prompt, then those of the tokens."""
        return (*self.prompt_readouts, *(readout for token in self.tokens for readout in token.readouts))


@dataclass(frozen=True)
class ScoreResult(Record):
    """Holds the log-probabilities of a continuation; perplexity = exp(-mean log-probability).

    sparsity, confidence: None unless the request asked for them.
    """

    tokens: tuple[Token, ...]
    total_logprob: float
    perplexity: float
    prompt_readouts: tuple[ReadoutValue, ...]
    receipt: Receipt
    usage: Usage
    sparsity: SparsityReport | None = None
    confidence: ConfidenceReport | None = None


@dataclass
class GenerateCollector:
    """Turns the messages of a stream into chunks, and keeps them for the result."""

    chunks: list[Chunk] = field(default_factory=list)

    def add(self, message: pb.GenerateResponse) -> Chunk:
        chunk = Chunk.from_proto(message)
        self.chunks.append(chunk)
        return chunk

    def result(self) -> GenerateResult | None:
        """Returns the whole; None while `finished` has not arrived, of each sample."""
        wholes = [self._whole(sample) for sample in sorted({chunk.sample for chunk in self.chunks})]
        finished = [whole for whole in wholes if whole is not None]
        if not finished or len(finished) < len(wholes):
            return None
        first, *others = finished
        return replace(first, others=tuple(others))

    def _whole(self, sample: int) -> GenerateResult | None:
        chunks = [chunk for chunk in self.chunks if chunk.sample == sample]
        finished = next((c.finished for c in chunks if c.finished is not None), None)
        if finished is None:
            return None
        return GenerateResult(
            text="".join(c.text for c in chunks),
            tokens=tuple(t for c in chunks for t in c.tokens),
            finish_reason=finished.reason,
            stop_string=finished.stop_string,
            receipt=finished.receipt,
            usage=finished.usage,
            seed=finished.seed,
            prompt_readouts=tuple(r for c in chunks for r in c.prompt_readouts),
            sparsity=finished.sparsity,
            grounding=finished.grounding,
            confidence=finished.confidence,
            prompt_tokens=tuple(t for c in chunks for t in c.prompt_tokens),
        )
