"""A scheme says which format each matrix of a dense model gets.

The matrices of blocks have the format that the scheme is named after. Embedding and unembedding have Q6_K beside the
smaller ones, as llama.cpp's files do: every token goes through both, and the logits are read off the second. Norms,
biases and tables of positions stay as they are. Where the rows of a matrix are not whole blocks of its format, it gets
the one with blocks of 32 that llama.cpp takes in its place, or else stays as it is; the card says so.
"""

from dataclasses import dataclass, replace

from patchclamp_server.cpu.stored import Format
from patchclamp_server.model.architectures import Family
from patchclamp_server.model.stored_tensors import StoredTensor

# Raise this when the same weights get other blocks: what the model computes changes with them.
REVISION = 1

_INSTEAD = {Format.Q4_K: Format.Q5_0, Format.Q6_K: Format.Q8_0}


@dataclass(frozen=True)
class Scheme:
    """`blocks` is the format of the matrices of blocks, `ends` that of embedding and unembedding."""

    name: str
    blocks: Format
    ends: Format

    def wanted(self, *, is_end: bool) -> Format:
        return self.ends if is_end else self.blocks

    def format_of(self, width: int, *, is_end: bool) -> Format | None:
        """Returns the format of a matrix with rows of `width` weights; None where no blocks fit."""
        wanted = self.wanted(is_end=is_end)
        return next((format for format in (wanted, _INSTEAD.get(wanted, wanted)) if width % format.weights == 0), None)


SCHEMES = {
    scheme.name: scheme
    for scheme in (
        Scheme("q8_0", Format.Q8_0, Format.Q8_0),
        Scheme("q6_k", Format.Q6_K, Format.Q6_K),
        Scheme("q5_1", Format.Q5_1, Format.Q6_K),
        Scheme("q5_0", Format.Q5_0, Format.Q6_K),
        Scheme("q4_k", Format.Q4_K, Format.Q6_K),
        Scheme("q4_1", Format.Q4_1, Format.Q6_K),
        Scheme("q4_0", Format.Q4_0, Format.Q6_K),
    )
}


def quantized_tensors(tensors: list[StoredTensor], scheme: Scheme, family: Family) -> list[StoredTensor]:
    """Returns what the tensors of a dense model will be in memory, as far as their names and shapes say."""
    return [_quantized(tensor, scheme, family) for tensor in tensors]


def _quantized(tensor: StoredTensor, scheme: Scheme, family: Family) -> StoredTensor:
    positions = family.position_embedding
    path = tensor.name.split(".")
    if len(tensor.shape) != 2 or (positions is not None and path[-2] == positions.split(".")[-1]):
        return tensor
    # Files may leave out the name of the whole model, and have another for the unembedding.
    is_end = family.layers.split(".")[-1] not in path
    # A transposed matrix of a block is turned before it is quantised.
    shape = tensor.shape[::-1] if family.transposed and not is_end else tensor.shape
    format = scheme.format_of(shape[-1], is_end=is_end)
    return tensor if format is None else replace(tensor, format=format, shape=shape)
