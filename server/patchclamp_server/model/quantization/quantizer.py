"""Quantises the matrices of a model one after another, and keeps what became of each for the card."""

import logging
import math

from patchclamp_server.cpu.quantize.matrix import quantize_matrix
from patchclamp_server.cpu.stored import StoredMatrix
from patchclamp_server.model.errors import ModelSourceError
from patchclamp_server.model.quantization.card import MatrixCard, Quality, QuantizationCard
from patchclamp_server.model.quantization.scheme import Scheme

logger = logging.getLogger(__name__)


class Quantizer:
    def __init__(self, scheme: Scheme) -> None:
        self.scheme = scheme
        self._cards: list[MatrixCard] = []

    def matrix(self, name: str, dense: StoredMatrix, *, is_end: bool = False) -> StoredMatrix:
        """Returns the matrix `name` in blocks, or itself where no blocks fit its rows; `is_end` says that it is the
        embedding or the unembedding. Raises ModelSourceError, with the name, for a weight that has no code."""
        width, weights = dense.shape[1], math.prod(dense.shape)
        wanted, format = self.scheme.wanted(is_end=is_end), self.scheme.format_of(width, is_end=is_end)
        matrix, error, squares = dense, 0.0, 0.0
        if format is not None:
            try:
                matrix, error, squares = quantize_matrix(dense, format)
            except ValueError as refusal:
                raise ModelSourceError(f"{name} cannot be quantised to {format.name}: {refusal}") from refusal
        else:
            format = dense.parts[0].format
        card = MatrixCard(
            name=name,
            format=format.name.lower(),
            weights=weights,
            width=width,
            nbytes=matrix.nbytes,
            error=error,
            squares=squares,
            wanted="" if format is wanted else wanted.name.lower(),
        )
        self._cards.append(card)
        return matrix

    def card(self, quality: Quality | None = None) -> QuantizationCard:
        """Returns the card of all matrices so far, and logs those that have another format than the scheme's."""
        card = QuantizationCard(self.scheme.name, tuple(self._cards), quality)
        for sentence in card.exceptions:
            logger.warning("%s", sentence)
        return card
