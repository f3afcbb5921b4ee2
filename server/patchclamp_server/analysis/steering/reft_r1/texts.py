"""The texts of both sides, those that are trained on and those that are held out."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from patchclamp_server.analysis.digests import json_digest
from patchclamp_server.analysis.neurons.batches import MAX_BYTES, check_examples
from patchclamp_server.analysis.neurons.localize.pooled import Comparison, divided_texts
from patchclamp_server.analysis.neurons.targets import Example, LogProbability
from patchclamp_server.analysis.steering.evidence import shuffled, training_pairs
from patchclamp_server.analysis.steering.examples import Split, TextSides, TokenPair
from patchclamp_server.errors import InvalidArgument, about
from patchclamp_server.model.spec import DecoderSpec
from patchclamp_server.text.prompt import PromptEncoder

Tokens = tuple[int, ...]
# Each is trained by itself, one after the other.
MAX_LAYERS = 8


@dataclass(frozen=True, eq=False)
class Texts:
    """Token ids of the positives and of the negatives."""

    positive: list[Tokens]
    negative: list[Tokens]


@dataclass(frozen=True, eq=False)
class DividedSides:
    """`field` of the request has the texts, and `described` is what provenance says of them."""

    training: Texts
    heldout: Texts
    field: str
    described: dict[str, Any]

    @property
    def numbers(self) -> dict[str, int]:
        return {
            "training_positives": len(self.training.positive),
            "training_negatives": len(self.training.negative),
            "heldout_positives": len(self.heldout.positive),
            "heldout_negatives": len(self.heldout.negative),
        }


def log_probability(text: Tokens) -> Example:
    """F is log p of all tokens of a text but the first, of which there is one at least."""
    return Example(text[:1], LogProbability(text[1:]))


def of_pairs(pairs: Sequence[TokenPair], split: Split, spec: DecoderSpec, max_bytes: int = MAX_BYTES) -> DividedSides:
    """Raises InvalidArgument on "pairs" and "pairs[i].positive" for what is too little, or too much for the memory."""
    n = training_pairs(len(pairs), split.fraction)
    for i, pair in enumerate(pairs):
        _check_positive(pair.positive, spec, f"pairs[{i}].positive", max_bytes)
    tokens = sum(len(pair.positive) + len(pair.negative) for pair in pairs)
    if (needed := tokens * _token_bytes(spec)) > max_bytes:
        message = f"their {tokens} tokens need {needed} bytes at a layer, the bound is {max_bytes}; send fewer"
        raise InvalidArgument("pairs", message)
    order = [pairs[i] for i in shuffled(len(pairs), split.seed)]
    training, heldout = (
        Texts([pair.positive for pair in own], [pair.negative for pair in own]) for own in (order[:n], order[n:])
    )
    digest = json_digest([[pair.positive, pair.negative] for pair in pairs])
    return DividedSides(training, heldout, "pairs", {"pairs": len(pairs), "pairs_digest": digest})


async def of_texts(prompts: PromptEncoder, texts: TextSides, split: Split, spec: DecoderSpec) -> DividedSides:
    """Raises InvalidArgument on "texts" for too few or too many, and "texts.window_tokens" for windows too long."""
    compared = Comparison(texts.target, texts.contrast, split.fraction, split.seed)
    found = await divided_texts(prompts, texts.source, compared, "texts", MAX_BYTES, token_bytes=_token_bytes(spec))
    training, heldout = (
        Texts(
            # The last window of a document may have one token, of which nothing can be predicted.
            [found.texts[i] for i in (own & found.is_target).nonzero()[:, 0].tolist() if len(found.texts[i]) > 1],
            [found.texts[i] for i in (own & ~found.is_target).nonzero()[:, 0].tolist()],
        )
        for own in (~found.heldout, found.heldout)
    )
    if not training.positive or not heldout.positive:
        raise InvalidArgument(
            "texts", "of the target have one token each; expected at least two, to predict the second"
        )
    # What gradients need depends on the length alone.
    for text in {len(text): text for text in (*training.positive, *heldout.positive)}.values():
        _check_positive(text, spec, "texts.window_tokens", MAX_BYTES)
    corpus = texts.source.corpus
    described = {
        "corpus": corpus.digest,
        "target": corpus.labels[texts.target],
        "contrast": "" if texts.contrast is None else corpus.labels[texts.contrast],
        "positives": len(training.positive) + len(heldout.positive),
        "negatives": len(training.negative) + len(heldout.negative),
    }
    return DividedSides(training, heldout, "texts", {"texts": described})


def _token_bytes(spec: DecoderSpec) -> int:
    """What is kept of a token at a layer: the stream before the layer and the state at a residual site."""
    return 8 * spec.d_model


def _check_positive(text: Tokens, spec: DecoderSpec, field: str, max_bytes: int) -> None:
    if len(text) < 2:
        raise InvalidArgument(field, "has one token; expected at least two, to predict the second")
    with about(field):
        check_examples([log_probability(text)], spec, field=field, max_bytes=max_bytes)
