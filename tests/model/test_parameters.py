"""What the architecture table says of parameters and rotary tables is what transformers' own modules have."""

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub.errors import StrictDataclassClassValidationError, StrictDataclassFieldValidationError
from tiny_models import CONFIGURATIONS, FAMILIES
from transformers import AutoModelForCausalLM, PreTrainedConfig
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from patchclamp_server.model.config_classes import LlamaConfig
from patchclamp_server.model.parameters import parameters_of
from patchclamp_server.model.rotary import rotary_tables
from patchclamp_server.model.spec import read_spec

LINEAR = {"rope_type": "linear", "rope_theta": 1e4, "factor": 4.0}
YARN = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 160}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 5e5,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
LONG = {
    "rope_type": "longrope",
    "rope_theta": 1e4,
    "short_factor": [1.0 + 0.1 * i for i in range(8)],
    "long_factor": [2.0 + i for i in range(8)],
    "original_max_position_embeddings": 64,
}
PARTS = {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5}
VARIANTS: list[tuple[str, dict[str, Any]]] = [
    *((family, {}) for family in FAMILIES),
    ("llama", {"attention_bias": False}),
    ("llama", {"mlp_bias": False}),
    ("llama", {"tie_word_embeddings": True, "head_dim": 24}),
    ("llama", {"rope_parameters": LINEAR}),
    ("llama", {"rope_parameters": LLAMA3}),
    ("qwen2", {"rope_parameters": YARN}),
    ("qwen3", {"attention_bias": True, "rope_parameters": YARN | {"beta_fast": 16.0, "attention_factor": 1.5}}),
    ("gemma2", {"attention_bias": True}),
    ("gemma3", {"attention_bias": True}),
    ("gemma3", {"rope_parameters": {"full_attention": LINEAR, "sliding_attention": {**LINEAR, "factor": 2.0}}}),
    ("phi3", {"rope_parameters": LONG, "original_max_position_embeddings": 64}),
    ("phi3", {"rope_parameters": PARTS}),
    ("gpt2", {"n_inner": None}),
    ("gpt2", {"tie_word_embeddings": False}),
    ("opt", {"enable_bias": False}),
    ("opt", {"layer_norm_elementwise_affine": False}),
    ("opt", {"tie_word_embeddings": False}),
    ("gpt_neox", {"attention_bias": False}),
    ("gpt_neox", {"tie_word_embeddings": True}),
]
ROTARY = [(family, changes) for family, changes in VARIANTS if family not in ("gpt2", "opt")]


def config_of(family: str, changes: dict[str, Any]) -> PreTrainedConfig:
    model_type = "gemma3_text" if family == "gemma3" else family
    return CONFIG_MAPPING[model_type](**{**CONFIGURATIONS[family], **changes})


def skeleton(config: PreTrainedConfig) -> Any:
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config)  # type: ignore[no-untyped-call]


def name(variant: object) -> str:
    return variant if isinstance(variant, str) else "-".join(variant) if isinstance(variant, dict) else ""


@pytest.mark.parametrize(("family", "changes"), VARIANTS, ids=name)
def test_parameters_are_those_of_the_model_of_transformers(family: str, changes: dict[str, Any]) -> None:
    config = config_of(family, changes)
    model, found = skeleton(config), parameters_of(config, read_spec(config))
    assert found.shapes == {name: tuple(value.shape) for name, value in model.state_dict().items()}
    weights = dict(model.named_parameters(remove_duplicate=False))
    shared = {one for one in weights for other in weights if one != other and weights[one] is weights[other]}
    assert found.tied == shared


@pytest.mark.parametrize(("family", "changes"), ROTARY, ids=name)
def test_rotary_tables_are_those_of_the_family_of_its_own_module(family: str, changes: dict[str, Any]) -> None:
    config = config_of(family, changes)
    spec = read_spec(config)
    path = "gpt_neox.rotary_emb" if family == "gpt_neox" else "model.rotary_emb"
    module = type(skeleton(config).get_submodule(path))(config)
    positions, like = torch.arange(spec.context_length)[None], torch.empty(1)
    tables = rotary_tables(config, spec)
    assert set(tables) == set(spec.rotary_kinds)
    for kind, (cos, signed_sin) in tables.items():
        expected_cos, sin = module(like, positions, kind) if kind else module(like, positions)
        half = sin.shape[-1] // 2
        assert torch.equal(cos, expected_cos[0])
        assert torch.equal(signed_sin, torch.cat((-sin[0, :, :half], sin[0, :, half:]), dim=1))


def test_a_server_of_a_gguf_file_does_not_import_the_models_of_transformers(tiny_gguf: Path) -> None:
    """That takes seconds at every start, and 170 MB. Of a directory transformers reads the configuration again when it
    chooses the tokenizer. The first start with a file makes its tokenizer by transformers, and keeps it."""
    code = """
import sys
from patchclamp_server.model.load import load_model
load_model(sys.argv[1])
print({"transformers.modeling_utils", "transformers.activations", "torch._dynamo"} & set(sys.modules))
"""
    command = [sys.executable, "-c", code, str(tiny_gguf)]
    _, again = (subprocess.run(command, capture_output=True, text=True, check=True).stdout for _ in range(2))
    assert again == "set()\n"


LLAMAS: list[dict[str, Any]] = [
    {},
    CONFIGURATIONS["llama"],
    {"head_dim": 16, "rope_theta": 5e5, "rope_scaling": {**LLAMA3, "type": "llama3"}},
    {"rope_parameters": YARN, "torch_dtype": "bfloat16", "eos_token_id": [1, 2], "unknown": 3},
]


@pytest.mark.parametrize("fields", LLAMAS)
def test_our_class_of_a_llamas_configuration_is_that_of_transformers(fields: dict[str, Any]) -> None:
    assert LlamaConfig(**fields).to_dict() == CONFIG_MAPPING["llama"](**fields).to_dict()


@pytest.mark.parametrize("fields", [{"hidden_size": "x"}, {"num_attention_heads": 3}, {"vocab_size": 2.5}])
def test_our_class_of_a_llamas_configuration_refuses_what_that_of_transformers_does(fields: dict[str, Any]) -> None:
    for kind in (LlamaConfig, CONFIG_MAPPING["llama"]):
        with pytest.raises((StrictDataclassClassValidationError, StrictDataclassFieldValidationError)):
            kind(**fields)
