"""The rest of the server reads here what it needs to know about the model that is served."""

from dataclasses import dataclass

from patchclamp_server.model.quantization.card import QuantizationCard
from patchclamp_server.model.sites import Site


@dataclass(frozen=True)
class ModelInfo:
    """Shapes, sites and identity of a loaded model. `sites` maps each site that the family has to its width."""

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
    sites: dict[Site, int]
    has_chat_template: bool = False
    # Of dense weights that were quantised when they were loaded.
    quantization: QuantizationCard | None = None
    # How products take activations: as dtype, or "int8" (cpu/integers/), which is no part of the fingerprint.
    activations: str = "float32"
