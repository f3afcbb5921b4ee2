"""Examples that are run together, and what their gradients need of memory, which is known before any is taken."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch

from patchclamp_server.analysis.neurons.targets import Example, Projection
from patchclamp_server.errors import InvalidArgument
from patchclamp_server.model.attention.batch import AttentionBatch
from patchclamp_server.model.attention.pools import Pool
from patchclamp_server.model.attention.spans import Span
from patchclamp_server.model.decoder import Decoder, StepInputs
from patchclamp_server.model.sites import Site, every_preactivation
from patchclamp_server.model.spec import DecoderSpec

# What one batch may need, and what a caller may ask to be kept.
MAX_BYTES = 1 << 30
# Token rows of a batch of several examples, so that a slice of one block beside requests is short.
ROWS = 256
_BLOCK = 16
# Copies of a number of each kind that one block holds at most while it is differentiated, both ways.
_RESIDUALS, _HEADS, _NEURONS, _SCORES, _LOGITS = 16, 12, 12, 6, 10


@dataclass(frozen=True, eq=False)
class Batch:
    """Examples whose gradients enter at one place, those of one token first."""

    examples: tuple[Example, ...]
    # Where they stand among all that were given.
    numbers: tuple[int, ...]

    @classmethod
    def of(cls, examples: Sequence[Example], numbers: Sequence[int] | None = None) -> "Batch":
        given = range(len(examples)) if numbers is None else numbers
        # Attention has the sequences of one row first.
        order = sorted(range(len(examples)), key=lambda i: len(examples[i].tokens) > 1)
        return cls(tuple(examples[i] for i in order), tuple(given[i] for i in order))

    @property
    def lengths(self) -> list[int]:
        return [len(example.tokens) for example in self.examples]

    @property
    def rows(self) -> int:
        return sum(self.lengths)

    @property
    def spans(self) -> list[slice]:
        """The rows of each example."""
        ends = torch.tensor(self.lengths).cumsum(0).tolist()
        return [slice(end - n, end) for end, n in zip(ends, self.lengths, strict=True)]

    def logit_rows(self, i: int) -> range:
        """Rows after which the target of the i-th example needs logits."""
        span = self.spans[i]
        return range(span.start + len(self.examples[i].prompt) - 1, span.stop)

    def inputs(self, decoder: Decoder, *sites: Site) -> StepInputs:
        """Every example a sequence of consecutive blocks of its own; block 0 stays empty. `sites` are visited."""
        spans, slots, first = [], [], 1
        for rows in self.spans:
            n = rows.stop - rows.start
            blocks = list(range(first, first + _blocks(n)))
            spans.append(Span(rows.start, n, 0, blocks))
            slots.append(first * _BLOCK + torch.arange(n))
            first += len(blocks)
        device = decoder.device
        every = every_preactivation(decoder.spec.n_layers)
        visited = {place: copied for place, copied in every.items() if place[0] in sites}
        return StepInputs(
            torch.tensor([token for example in self.examples for token in example.tokens], device=device),
            torch.cat([torch.arange(n) for n in self.lengths]).to(device),
            torch.cat(slots).to(device),
            AttentionBatch(spans, _BLOCK, decoder.windows, device),
            visited_preactivations=visited,
        )

    def pool(self, decoder: Decoder) -> Pool:
        """KV of one layer, which all may use in turn: each reads only what it has written."""
        return decoder.pool(1 + sum(map(_blocks, self.lengths)), _BLOCK)


def batches(examples: Sequence[Example], spec: DecoderSpec, max_bytes: int = MAX_BYTES) -> Iterator[Batch]:
    """All examples in batches of at most ROWS rows or one example, and of examples whose gradients enter together."""
    by_place: dict[tuple[int, Site], list[int]] = {}
    for number, example in enumerate(examples):
        by_place.setdefault(example.place(spec), []).append(number)
    for numbers in by_place.values():
        numbers.sort(key=lambda number: len(examples[number].tokens))
        own: list[int] = []
        for number in numbers:
            more = [examples[i] for i in (*own, number)]
            if own and (sum(len(e.tokens) for e in more) > ROWS or needed_bytes(more, spec) > max_bytes):
                yield Batch.of([examples[i] for i in own], own)
                own = []
            own.append(number)
        yield Batch.of([examples[i] for i in own], own)


def needed_bytes(examples: Sequence[Example], spec: DecoderSpec) -> int:
    """Memory of a batch, above:

        4 · ((L + 16) T d + 12 T h + 12 T (1 + gated) f + 6 H Σ n² + 10 k V)

    T: all tokens; n: those of an example; k: those after which logits are needed; L: layers; d, f, V: widths of the
    residual stream, of the neurons and of the vocabulary; H heads, with keys and values h wide. The residual stream
    before each block is kept, one block at a time is differentiated.
    """
    lengths = [len(example.tokens) for example in examples]
    tokens = sum(lengths)
    logits = sum(0 if isinstance(e.target, Projection) else len(e.tokens) - len(e.prompt) + 1 for e in examples)
    heads = (spec.n_heads + 2 * spec.n_kv_heads) * spec.head_dim
    neurons = spec.d_ff * (2 if spec.family.gated else 1)
    return 4 * (
        (spec.n_layers + _RESIDUALS) * tokens * spec.d_model
        + _HEADS * tokens * heads
        + _NEURONS * tokens * neurons
        + _SCORES * spec.n_heads * sum(n * n for n in lengths)
        + _LOGITS * logits * spec.vocab_size
    )


def check_examples(
    examples: Sequence[Example], spec: DecoderSpec, *, field: str, max_bytes: int = MAX_BYTES, kept_per_token: int = 0
) -> None:
    """Refuses what cannot run or does not fit, before anything is computed.

    `kept_per_token`: bytes that the caller keeps of each token. Raises InvalidArgument by field path:
    `field`[i].prompt, `field`[i].target and what is below it.
    """
    if not examples:
        raise InvalidArgument(field, "has no examples; accepted: at least one")
    for i, example in enumerate(examples):
        example.check(spec, f"{field}[{i}]")
        needed = needed_bytes([example], spec) + kept_per_token * len(example.tokens)
        if needed > max_bytes:
            raise InvalidArgument(
                f"{field}[{i}].prompt",
                f"{len(example.tokens)} tokens run: their gradients need {needed} bytes, the bound is {max_bytes}; "
                "accepted: fewer tokens, or fewer layers where they are kept",
            )


def _blocks(tokens: int) -> int:
    return (tokens + _BLOCK - 1) // _BLOCK
