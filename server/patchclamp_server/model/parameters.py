"""The parameters of a model: their names and shapes follow from its configuration and the architecture table.

transformers would say the same of a model on the meta device, but what it imports for that takes seconds and 170 MB.
Tests hold every family against it.
"""

from dataclasses import dataclass

from transformers import PreTrainedConfig

from patchclamp_server.model.architectures import Family, NormKind
from patchclamp_server.model.spec import DecoderSpec

Shape = tuple[int, ...]


@dataclass(frozen=True)
class Parameters:
    """`shapes` is in the order of a forward pass. `tied`: the names of embedding and unembedding where they are one."""

    architecture: str
    shapes: dict[str, Shape]
    tied: frozenset[str]

    def lacking(self, there: set[str]) -> list[str]:
        """Returns what is missing. One name is enough for a tied embedding."""
        found = there | self.tied if there & self.tied else there
        return [name for name in self.shapes if name not in found]


def parameters_of(config: PreTrainedConfig, spec: DecoderSpec) -> Parameters:
    """Returns the parameters of a causal LM."""
    config, family = config.get_text_config(), spec.family
    embedding, unembedding = f"{family.embedding}.weight", f"{family.unembedding}.weight"
    shapes: dict[str, Shape] = {embedding: (spec.vocab_size, spec.d_model)}
    if family.position_embedding is not None:
        # LongRoPE may serve fewer positions than there are, but has no such table.
        rows = config.max_position_embeddings + family.position_offset
        shapes[f"{family.position_embedding}.weight"] = (rows, spec.d_model)
    for layer in range(spec.n_layers):
        block = _block(config, spec)
        shapes |= {f"{family.layers}.{layer}.{name}": shape for name, shape in block.items()}
    shapes |= _norm(config, family, family.final_norm, spec.d_model)
    shapes[unembedding] = (spec.vocab_size, spec.d_model)
    tied = frozenset({embedding, unembedding}) if getattr(config, "tie_word_embeddings", False) else frozenset[str]()
    return Parameters(spec.architecture, shapes, tied)


def _block(config: PreTrainedConfig, spec: DecoderSpec) -> dict[str, Shape]:
    family, d_model = spec.family, spec.d_model
    queries, keys = spec.n_heads * spec.head_dim, spec.n_kv_heads * spec.head_dim
    rows = (queries, keys, keys) if len(family.qkv) > 1 else (queries + 2 * keys,)
    neurons = spec.d_ff * (2 if family.gated and len(family.mlp_input) == 1 else 1)
    shapes: dict[str, Shape] = {}

    def norm(path: str | None, width: int = d_model) -> None:
        if path is not None:
            shapes.update(_norm(config, family, path, width))

    def product(path: str, outputs: int, inputs: int, bias: bool | str) -> None:
        shapes[f"{path}.weight"] = (inputs, outputs) if family.transposed else (outputs, inputs)
        if _has(config, bias):
            shapes[f"{path}.bias"] = (outputs,)

    norm(family.attn_norm)
    for path, outputs in zip(family.qkv, rows, strict=True):
        product(path, outputs, d_model, family.qkv_bias)
    norm(family.q_norm, spec.head_dim)
    norm(family.k_norm, spec.head_dim)
    product(family.attn_output, d_model, queries, family.attn_output_bias)
    norm(family.post_attn_norm)
    norm(family.mlp_norm)
    for path in family.mlp_input:
        product(path, neurons, d_model, family.mlp_bias)
    product(family.mlp_output, d_model, spec.d_ff, family.mlp_bias)
    norm(family.post_mlp_norm)
    return shapes


def _norm(config: PreTrainedConfig, family: Family, path: str, width: int) -> dict[str, Shape]:
    if family.norm is not NormKind.LAYER:
        return {f"{path}.weight": (width,)}
    # OPT's norms may lack both weight and bias: they only normalise.
    return {f"{path}.{kind}": (width,) for kind in ("weight", "bias") if _has(config, family.norm_weights)}


def _has(config: PreTrainedConfig, said: bool | str) -> bool:
    return said if isinstance(said, bool) else bool(getattr(config, said))
