"""Configuration classes by model type: those of transformers, but for llama's.

Its module imports operators and kernels that nothing here runs (utils/type_validators.py in 5.23), which takes
two seconds at every start and 130 MB. Tests hold ours against it.
"""

from huggingface_hub.dataclasses import strict
from transformers import PreTrainedConfig
from transformers.models.auto.configuration_auto import CONFIG_MAPPING


@strict
class LlamaConfig(PreTrainedConfig):  # type: ignore[no-untyped-call]
    """The fields of transformers' own, and their defaults."""

    model_type = "llama"

    vocab_size: int = 32000
    hidden_size: int = 4096
    intermediate_size: int = 11008
    num_hidden_layers: int = 32
    num_attention_heads: int = 32
    num_key_value_heads: int | None = None
    hidden_act: str = "silu"
    max_position_embeddings: int = 2048
    initializer_range: float = 0.02
    rms_norm_eps: float = 1e-6
    use_cache: bool = True
    pad_token_id: int | None = None
    bos_token_id: int | None = 1
    eos_token_id: int | list[int] | None = 2
    pretraining_tp: int | None = 1
    tie_word_embeddings: bool = False
    rope_parameters: dict | None = None  # type: ignore[type-arg]  # `strict` reads the annotation
    attention_bias: bool = False
    attention_dropout: int | float | None = 0.0
    mlp_bias: bool = False
    head_dim: int | None = None

    def __post_init__(self, **kwargs: object) -> None:
        if self.head_dim is None:
            self.head_dim = self.hidden_size // self.num_attention_heads
        if self.num_key_value_heads is None:
            self.num_key_value_heads = self.num_attention_heads
        super().__post_init__(**kwargs)  # type: ignore[no-untyped-call]

    def validate_architecture(self) -> None:
        """Is called by `strict`."""
        if self.hidden_size % self.num_attention_heads:
            raise ValueError(f"{self.hidden_size} channels cannot be shared by {self.num_attention_heads} heads")


def config_class(model_type: str) -> type[PreTrainedConfig]:
    """Returns the class of a type that transformers knows. Raises KeyError for another."""
    if model_type == "llama":
        return LlamaConfig
    found: type[PreTrainedConfig] = CONFIG_MAPPING[model_type]
    return found
