"""What features do on the tokens of two sides: sums over tokens, for any number of features and tokens.

    mean_s(f) = sum of f over the tokens of side s / their number
    score(f)  = (mean_0 - mean_1) / deviation,   deviation² = (n_0 var_0 + n_1 var_1) / (n_0 + n_1)
    explained variance = 1 - sum |y - ŷ|² / sum |y - mean y|²     over all tokens, ŷ the reconstruction of y

Kept: 5 numbers of 64 bits a feature. Beside it a block of rows of encoder and decoder (tensor_file.py), and the
activations of its features at BATCH_TOKENS tokens.
"""

import torch
from torch import Tensor

from patchclamp_server.artifacts.autoencoders import Autoencoder

BATCH_TOKENS = 512
# Of the larger mean: a deviation below is one of rounding.
_LEAST_DEVIATION = 1e-6
NO_SIDE = -1


class FeatureStatistics:
    def __init__(self, autoencoder: Autoencoder) -> None:
        self._autoencoder = autoencoder
        n = autoencoder.n_features
        self._sums, self._squares = torch.zeros(2, n, dtype=torch.float64), torch.zeros(2, n, dtype=torch.float64)
        self._fired = torch.zeros(n, dtype=torch.int64)
        self._of_sides = torch.zeros(2, dtype=torch.float64)
        self._output_sum = torch.zeros(autoencoder.output_width, dtype=torch.float64)
        self._output_squares = self._errors = 0.0
        self.tokens = 0

    def add(self, inputs: Tensor, outputs: Tensor, sides: Tensor) -> None:
        """inputs [n, width] and outputs [n, output width] float32 of n tokens; sides int64 [n]: 0, 1 or NO_SIDE."""
        for start in range(0, len(sides), BATCH_TOKENS):
            part = slice(start, start + BATCH_TOKENS)
            self._add(inputs[part], outputs[part], sides[part])

    def _add(self, inputs: Tensor, outputs: Tensor, sides: Tensor) -> None:
        chosen = torch.stack([(sides == side).double() for side in (0, 1)])
        reconstruction = self._autoencoder.decoder_bias.expand(len(outputs), -1).clone()
        for start, f in self._autoencoder.activation_blocks(inputs):
            end = start + f.shape[1]
            self._fired[start:end] += (f > 0).sum(0)
            doubles = f.double()
            self._sums[:, start:end] += chosen @ doubles
            self._squares[:, start:end] += chosen @ doubles.square_()
            reconstruction.addmm_(f, self._autoencoder.file.rows("decoder", start, end).float())
        doubles = outputs.double()
        self._output_sum += doubles.sum(0)
        self._output_squares += float(doubles.square().sum())
        self._errors += float((doubles - reconstruction.double()).square().sum())
        self._of_sides += chosen.sum(1)
        self.tokens += len(sides)

    def tokens_of(self, side: int) -> int:
        return int(self._of_sides[side])

    def means(self) -> Tensor:
        """float64 [2, features]; both sides must have tokens."""
        return self._sums / self._of_sides[:, None]

    def scores(self) -> Tensor:
        """float64 [features]; of a feature that is the same everywhere 0."""
        means = self.means()
        variances = (self._squares / self._of_sides[:, None] - means.square()).clamp_min(0)
        deviation = ((self._of_sides @ variances) / self._of_sides.sum()).sqrt()
        least = _LEAST_DEVIATION * means.abs().amax(0)
        difference = means[0] - means[1]
        return torch.where(difference == 0, 0.0, difference / torch.maximum(deviation, least).clamp_min(1e-300))

    def rates(self) -> Tensor:
        """float64 [features]: the share of all tokens at which each fires."""
        return self._fired.double() / self.tokens

    @property
    def active_features(self) -> int:
        return int((self._fired > 0).sum())

    @property
    def mean_active(self) -> float:
        """Features that fire at a token, on average."""
        return float(self._fired.sum()) / self.tokens

    @property
    def explained_variance(self) -> float:
        """0 where the activations are all the same."""
        variance = self._output_squares - float(self._output_sum.square().sum()) / self.tokens
        return 1.0 - self._errors / variance if variance > 0 else 0.0
