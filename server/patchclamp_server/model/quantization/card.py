"""The card of a quantised model: what each matrix became, and how far the model is from the one that it was made of.

relative squared error = Σ (x' - x)² / Σ x²         over the weights x, and what became of them x'
bits a weight          = 8 · bytes of the blocks / weights
"""

import json
from collections import Counter
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from patchclamp_server.cpu.stored import Format
from patchclamp_server.files import cache_root, write_atomically


@dataclass(frozen=True)
class MatrixCard:
    """One matrix. `wanted` is the format that the scheme has for it, where `format` is another: its rows of `width`
    weights are not whole blocks of it."""

    name: str
    format: str
    weights: int
    width: int
    nbytes: int
    error: float
    squares: float
    wanted: str = ""


@dataclass(frozen=True)
class FormatCard:
    """All matrices of one format."""

    format: str
    matrices: int
    weights: int
    bits_per_weight: float
    relative_squared_error: float


@dataclass(frozen=True)
class Quality:
    """The quantised model against the dense one on `tokens` tokens of text: mean KL(dense ‖ quantised) in nats, the
    share of tokens with the same first choice, and perplexity over that of the dense model."""

    divergence: float
    top1_agreement: float
    perplexity_ratio: float
    dense_perplexity: float
    tokens: int


@dataclass(frozen=True)
class QuantizationCard:
    """`quality` is None until it was measured once (`patchclamp quantize-card`)."""

    scheme: str
    matrices: tuple[MatrixCard, ...]
    quality: Quality | None = None

    @property
    def bits_per_weight(self) -> float:
        return _bits(self.matrices)

    @property
    def relative_squared_error(self) -> float:
        return _error(self.matrices)

    @property
    def exceptions(self) -> tuple[str, ...]:
        """Says which matrices have another format than the scheme's: a sentence for all of one kind."""
        kinds = Counter((of.wanted, of.format, of.width) for of in self.matrices if of.wanted)
        return tuple(
            f"{count} {'matrix is' if count == 1 else 'matrices are'} in {format}: rows of {width} weights are not "
            f"whole blocks of {Format[wanted.upper()].weights}, as {wanted} has"
            for (wanted, format, width), count in kinds.items()
        )

    @property
    def formats(self) -> tuple[FormatCard, ...]:
        """The matrices by format, the most weights first."""
        own = {name: [m for m in self.matrices if m.format == name] for name in {m.format for m in self.matrices}}
        cards = [
            FormatCard(name, len(of), sum(m.weights for m in of), _bits(of), _error(of)) for name, of in own.items()
        ]
        return tuple(sorted(cards, key=lambda card: -card.weights))


def _bits(matrices: Iterable[MatrixCard]) -> float:
    matrices = tuple(matrices)
    return 8 * sum(m.nbytes for m in matrices) / max(1, sum(m.weights for m in matrices))


def _error(matrices: Iterable[MatrixCard]) -> float:
    matrices = tuple(matrices)
    squares = sum(m.squares for m in matrices)
    return sum(m.error for m in matrices) / squares if squares else 0.0


def stored_quality(fingerprint: str) -> Quality | None:
    """Returns what was measured of the quantised model with this fingerprint, or None: nothing was, or it cannot be
    read."""
    try:
        return Quality(**json.loads(_path(fingerprint).read_bytes())["quality"])
    except (OSError, ValueError, KeyError, TypeError):
        return None


def store_card(fingerprint: str, card: QuantizationCard) -> Path:
    """Keeps a card beside the cache of models, and returns where. Raises OSError where that cannot be written."""
    path = _path(fingerprint)
    write_atomically(path, json.dumps(as_json(card), indent=1).encode())
    return path


def as_json(card: QuantizationCard) -> dict[str, Any]:
    """Returns the card for JSON, with what follows from its matrices."""
    sums = {"bits_per_weight": card.bits_per_weight, "relative_squared_error": card.relative_squared_error}
    return {**asdict(card), **sums, "formats": [asdict(format) for format in card.formats]}


def _path(fingerprint: str) -> Path:
    return cache_root() / "quantization" / f"{fingerprint}.json"
