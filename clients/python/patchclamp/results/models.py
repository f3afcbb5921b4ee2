"""What is served, and how a prompt is tokenised."""

from dataclasses import dataclass

from patchclamp.names import SITES, name_of
from patchclamp.results.record import Record
from patchclamp.v1 import model_pb2 as pb


@dataclass(frozen=True)
class Model(Record):
    """Shapes and identity of a served model; `sites` maps each site the family has to its width."""

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

    @classmethod
    def from_proto(cls, message: pb.Model) -> "Model":
        return cls(
            name=message.name,
            fingerprint=message.fingerprint,
            architecture=message.architecture,
            n_layers=message.n_layers,
            d_model=message.d_model,
            d_ff=message.d_ff,
            n_heads=message.n_heads,
            n_kv_heads=message.n_kv_heads,
            head_dim=message.head_dim,
            vocab_size=message.vocab_size,
            context_length=message.context_length,
            dtype=message.dtype,
            device=message.device,
            sites={name_of(SITES, s.site): s.width for s in message.sites},
            has_chat_template=message.has_chat_template,
        )


@dataclass(frozen=True)
class Tokenization(Record):
    """The prompt as the model sees it: id, text and (for messages) role of each token."""

    ids: tuple[int, ...]
    pieces: tuple[str, ...]
    roles: tuple[str, ...]

    @classmethod
    def from_proto(cls, message: pb.TokenizeResponse) -> "Tokenization":
        return cls(tuple(message.ids), tuple(message.pieces), tuple(message.roles))


@dataclass(frozen=True)
class Detokenization(Record):
    """text: of all tokens together; pieces: of each by itself, with U+FFFD for bytes that are no whole character."""

    text: str
    pieces: tuple[str, ...]

    @classmethod
    def from_proto(cls, message: pb.DetokenizeResponse) -> "Detokenization":
        return cls(message.text, tuple(message.pieces))
