"""Stored autoencoders are loaded here: activations of features, reconstructions, and rows of chosen features.

The formulas are those of autoencoder_spec.py. Rows are read by slices of the file, so that an autoencoder of hundreds
of megabytes need not fit into memory.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Protocol

import torch
from torch import Tensor

from patchclamp_server.artifacts.autoencoder_spec import AutoencoderSpec, Function, autoencoder_spec
from patchclamp_server.artifacts.tensor_file import TensorFile, blocks
from patchclamp_server.artifacts.types import ArtifactInfo, ArtifactKind
from patchclamp_server.errors import FailedPrecondition, InvalidArgument, about
from patchclamp_server.model.info import ModelInfo


@dataclass(frozen=True, eq=False)
class FeatureRows:
    """Chosen features [n] of an autoencoder in float32: `encoder` [n, width], `bias`, `threshold` [n], `decoder`
    [n, output width], and `subtracted` [width] or None. `threshold` is 0 where the function has none."""

    features: tuple[int, ...]
    encoder: Tensor
    bias: Tensor
    threshold: Tensor
    decoder: Tensor
    subtracted: Tensor | None

    @cached_property
    def folded_bias(self) -> Tensor:
        """float32 [n]: p = h . encoder^T + folded_bias, with what is subtracted from h already in it."""
        if self.subtracted is None:
            return self.bias
        return (self.bias.double() - self.encoder.double() @ self.subtracted.double()).float()

    def one(self, i: int) -> "FeatureRows":
        """Returns the i-th of them alone."""
        at = slice(i, i + 1)
        parts = (self.encoder[at], self.bias[at], self.threshold[at], self.decoder[at])
        return FeatureRows(self.features[at], *parts, self.subtracted)

    def preactivations(self, h: Tensor) -> Tensor:
        """Returns p [tokens, n] in float32 of activations [tokens, width]."""
        h = h.float()
        return torch.addmm(self.bias, h if self.subtracted is None else h - self.subtracted, self.encoder.T)


class Autoencoder:
    """A stored autoencoder. Its vectors are in memory, in float32; rows of its matrices are read where they are needed.

    Memory beside what is returned: the vectors, and one block of rows (tensor_file.BLOCK_BYTES, twice that for weights
    of 16 bits) with the pre-activations of it.
    """

    def __init__(self, spec: AutoencoderSpec, file: TensorFile) -> None:
        self.spec = spec
        self.file = file
        self.n_features, self.width = file.shapes["encoder"]
        self.output_width = file.shapes["decoder"][1]
        self.encoder_bias = file.tensor("encoder_bias").float()
        self.decoder_bias = file.tensor("decoder_bias").float()
        self.threshold = torch.zeros(self.n_features)
        if "threshold" in file.shapes:
            # p <= 0 is no activation of any function, so that a negative threshold is none.
            self.threshold = file.tensor("threshold").float().clamp(min=0.0)
        self.subtracted = self.decoder_bias if spec.subtracts_decoder_bias else None

    def rows(self, features: Sequence[int]) -> FeatureRows:
        """Reads these features, in their order, and no other. They must be in [0, n_features)."""
        index = torch.tensor(features, dtype=torch.int64)
        return FeatureRows(
            tuple(features),
            self.file.chosen("encoder", features).float(),
            self.encoder_bias[index],
            self.threshold[index],
            self.file.chosen("decoder", features).float(),
            self.subtracted,
        )

    def encode(self, h: Tensor, features: Sequence[int] | None = None) -> Tensor:
        """Returns f float32 [tokens, features] of activations [tokens, width]: of all, or of these in their order.

        Of topk the rows of all features are read, since the k-th largest is among all.
        """
        if features is None:
            return torch.cat([f for _, f in self.activation_blocks(h)], dim=1)
        if self.spec.function is Function.TOPK:
            chosen, found = torch.tensor(features, dtype=torch.int64), torch.empty(len(h), len(features))
            for start, f in self.activation_blocks(h):
                here = ((chosen >= start) & (chosen < start + f.shape[1])).nonzero().flatten()
                found[:, here] = f[:, chosen[here] - start]
            return found
        rows = self.rows(features)
        p = rows.preactivations(h)
        return torch.where(p > rows.threshold, p, 0.0)

    def activation_blocks(self, h: Tensor) -> Iterator[tuple[int, Tensor]]:
        """Yields the first feature of each block of rows, and f float32 [tokens, features of the block]."""
        kth = self._kth_largest(h) if self.spec.function is Function.TOPK else None
        for start, p in self.preactivation_blocks(h):
            # The products are the same as those in which the k-th largest was found: another would round otherwise.
            active = p > self.threshold[start : start + p.shape[1]] if kth is None else (p >= kth) & (p > 0)
            yield start, torch.where(active, p, 0.0)

    def _kth_largest(self, h: Tensor) -> Tensor:
        """Returns the k-th largest pre-activation [tokens, 1] of all features."""
        largest = torch.empty(len(h), 0)
        for _, p in self.preactivation_blocks(h):
            both = torch.cat((largest, p), dim=1)
            largest = both.topk(min(self.spec.k, both.shape[1]), dim=1).values
        return largest[:, -1:]

    def preactivation_blocks(self, h: Tensor) -> Iterator[tuple[int, Tensor]]:
        """Yields the first feature of each block of rows, and p float32 [tokens, features of the block]."""
        h = h.float() if self.subtracted is None else h.float() - self.subtracted
        for start, encoder in blocks(self.file, "encoder"):
            bias = self.encoder_bias[start : start + len(encoder)]
            yield start, torch.addmm(bias, h, encoder.float().T)

    def decode(self, activations: Tensor) -> Tensor:
        """Returns the reconstruction float32 [tokens, output width] of f [tokens, features] of all features."""
        found = self.decoder_bias.expand(len(activations), -1).clone()
        for start, decoder in blocks(self.file, "decoder"):
            found.addmm_(activations[:, start : start + len(decoder)], decoder.float())
        return found


class TensorFiles(Protocol):
    """A store that opens artifacts without reading all of them; raises NotFound for an unknown one."""

    def open(self, ref: str) -> tuple[ArtifactInfo, TensorFile]: ...


def open_autoencoder(ref: str, store: TensorFiles, model: ModelInfo, path: str) -> tuple[ArtifactInfo, Autoencoder]:
    """Returns an autoencoder of the served model, by id or tag. Errors name `path`, also those of rows that are read
    later, when it has been deleted.

    Raises NotFound, InvalidArgument (another kind of artifact) or FailedPrecondition (of another model, damaged).
    """
    with about(path):
        info, file = store.open(ref)
    if info.kind is not ArtifactKind.AUTOENCODER:
        raise InvalidArgument(path, f"{ref} is a {info.kind.value}, not an autoencoder")
    if info.model_fingerprint != model.fingerprint:
        raise FailedPrecondition(
            path, f"{ref} was made for model {info.model_fingerprint}, served is {model.fingerprint}"
        )

    def read(start: int, end: int) -> bytes:
        with about(path):
            return file.read(start, end)

    return info, Autoencoder(autoencoder_spec(info.site, info.provenance), TensorFile(file.header, read))
