"""What is served, and how a prompt is tokenised."""

from dataclasses import dataclass
from typing import Any

from patchclamp.names import name_of
from patchclamp.results.record import Record
from patchclamp.v1 import model_pb2 as pb
from patchclamp.v1 import program_pb2


@dataclass(frozen=True)
class QuantizedFormat(Record):
    """Counts the matrices of a quantised model that have one format."""

    format: str
    matrices: int
    weights: int
    bits_per_weight: float
    relative_squared_error: float


@dataclass(frozen=True)
class QuantizationQuality(Record):
    """Compares a quantised model with the dense one on ordinary text: mean KL(dense ‖ quantised) in nats, the share of
    tokens with the same first choice, and the ratio of perplexities."""

    divergence: float
    top1_agreement: float
    perplexity_ratio: float
    dense_perplexity: float
    tokens: int


@dataclass(frozen=True)
class Quantization(Record):
    """The card of a quantised model; `quality` is None until `patchclamp quantize-card` has measured it."""

    scheme: str
    bits_per_weight: float
    relative_squared_error: float
    formats: tuple[QuantizedFormat, ...]
    quality: QuantizationQuality | None


@dataclass(frozen=True)
class Model(Record):
    """Describes a served model; `sites` maps each site that the family has to its width. `quantization` is set where
    its weights were quantised when they were loaded."""

    name: str
    fingerprint: str
    architecture: str
    n_layers: int
    d_model: int
    d_ff: int
    n_heads: int
    n_kv_heads: int
    head_dim: int
    vocab_size: int
    context_length: int
    dtype: str
    device: str
    sites: dict[str, int]
    has_chat_template: bool
    quantization: Quantization | None
    activations: str

    @classmethod
    def from_proto(cls, message: pb.Model, **given: Any) -> "Model":
        sites = {name_of(program_pb2.Site.DESCRIPTOR, each.site): each.width for each in message.sites}
        return super().from_proto(message, sites=sites, **given)


@dataclass(frozen=True)
class Tokenization(Record):
    """Holds the prompt as the model sees it: id, text and (for messages) role of each token."""

    ids: tuple[int, ...]
    pieces: tuple[str, ...]
    roles: tuple[str, ...]


@dataclass(frozen=True)
class Detokenization(Record):
    """Holds the text of token ids.

    text: that of all together. pieces: that of each by itself, with U+FFFD for bytes that are no whole character.
    """

    text: str
    pieces: tuple[str, ...]
