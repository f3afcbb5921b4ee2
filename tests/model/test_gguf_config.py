"""What a GGUF file says of its model decides what is computed: transformers, set up with the same, is the oracle."""

import copy
import random
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from gguf_files import assert_serves, write_gguf
from tiny_models import tiny_model
from transformers import AutoModelForCausalLM, PreTrainedModel

from patchclamp_server.model.errors import ModelSourceError
from patchclamp_server.model.gguf.header import Header, read_header
from patchclamp_server.model.gguf.vocabulary import check_vocabulary
from patchclamp_server.model.load import load_model

FAMILIES = ("llama", "qwen2", "qwen3", "gemma2", "gemma3", "phi3", "gpt2")
ROTARY_DIM = 12  # of the tiny llama
THETA = 10000.0
pytestmark = pytest.mark.usefixtures("own_cache")


def with_config(model: PreTrainedModel, **changes: Any) -> PreTrainedModel:
    """The same weights under another configuration."""
    config = copy.deepcopy(model.config)
    for key, value in changes.items():
        setattr(config, key, value)
    changed: PreTrainedModel = AutoModelForCausalLM.from_config(  # type: ignore[no-untyped-call]
        config, attn_implementation="eager", dtype=torch.float32
    )
    changed.load_state_dict(model.state_dict())
    changed.train(False)
    return changed


@pytest.mark.parametrize("family", FAMILIES)
def test_a_file_of_each_family_is_served_as_the_model_it_was_made_of(family: str, tmp_path: Path) -> None:
    model = tiny_model(family)
    assert_serves(write_gguf(tmp_path / "m.gguf", model), model)


def rope(kind: str, **parameters: Any) -> dict[str, Any]:
    return {"rope_parameters": {"rope_type": kind, "rope_theta": THETA, **parameters}}


FACTORS = [1.0, 1.5, 2.0, 4.0, 7.5, 8.0]
YARN = {"factor": 4.0, "original_max_position_embeddings": 160}
SCALINGS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "another base": ({"rope.freq_base": 500.0}, {"rope_parameters": {"rope_type": "default", "rope_theta": 500.0}}),
    "linear": ({"rope.scaling.type": "linear", "rope.scaling.factor": 4.0}, rope("linear", factor=4.0)),
    "a factor without a type": ({"rope.scaling.factor": 2.0}, rope("linear", factor=2.0)),
    "the linear factor of old files": ({"rope.scale_linear": 2.0}, rope("linear", factor=2.0)),
    "none, whatever the factor": ({"rope.scaling.type": "none", "rope.scaling.factor": 4.0}, {}),
    "yarn": (
        {
            "rope.scaling.type": "yarn",
            "rope.scaling.factor": 4.0,
            "rope.scaling.original_context_length": 160,
            "rope.scaling.finetuned": True,
        },
        rope("yarn", **YARN),
    ),
    "yarn with its constants": (
        {
            "rope.scaling.type": "yarn",
            "rope.scaling.factor": 4.0,
            "rope.scaling.original_context_length": 160,
            "rope.scaling.attn_factor": 0.8,
            "rope.scaling.yarn_beta_fast": 16.0,
            "rope.scaling.yarn_beta_slow": 2.0,
        },
        rope("yarn", **YARN, beta_fast=16.0, beta_slow=2.0, attention_factor=0.8 * (0.1 * float(np.log(4.0)) + 1.0)),
    ),
}


@pytest.mark.parametrize("name", SCALINGS)
def test_a_rotary_scaling_of_the_file_is_applied(name: str, tmp_path: Path) -> None:
    keys, changes = SCALINGS[name]
    model = tiny_model("llama")
    assert_serves(write_gguf(tmp_path / "m.gguf", model, keys=keys), with_config(model, **changes))


def test_the_rotary_factors_of_llama_3_are_applied(tmp_path: Path) -> None:
    """What transformers computes from four numbers is in the file, a number for each frequency."""
    model = tiny_model("llama")
    llama3 = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 64}
    oracle = with_config(model, **rope("llama3", **llama3))
    plain, scaled = (m.model.rotary_emb.inv_freq.numpy() for m in (model, oracle))
    path = write_gguf(tmp_path / "m.gguf", model, tensors={"rope_freqs.weight": plain / scaled})
    assert not np.allclose(plain, scaled)
    assert_serves(path, oracle)


def test_phi3_is_served_with_its_short_factors_up_to_the_length_of_its_training(tmp_path: Path) -> None:
    model = tiny_model("phi3")
    short, long = [1.0 + 0.1 * i for i in range(8)], [2.0 + i for i in range(8)]
    keys = {"rope.scaling.original_context_length": 64, "rope.scaling.attn_factor": 1.19, "rope.dimension_count": 16}
    factors = {"rope_factors_short.weight": short, "rope_factors_long.weight": long}
    path = write_gguf(tmp_path / "m.gguf", model, keys=keys, tensors=factors)
    parameters = rope("longrope", short_factor=short, long_factor=long, attention_factor=1.19)
    parameters["rope_parameters"]["original_max_position_embeddings"] = 64
    oracle = with_config(model, **parameters, original_max_position_embeddings=64)
    assert_serves(path, oracle, n=64)
    assert load_model(str(path)).info.context_length == 64


def test_the_scaling_of_gemma3_is_that_of_its_global_layers(tmp_path: Path) -> None:
    model = tiny_model("gemma3")
    keys = {"rope.scaling.type": "linear", "rope.scaling.factor": 8.0, "rope.freq_base": 1e6}
    full = {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6}
    local = {"rope_type": "default", "rope_theta": THETA}
    parameters = {"full_attention": full, "sliding_attention": local}
    assert_serves(write_gguf(tmp_path / "m.gguf", model, keys=keys), with_config(model, rope_parameters=parameters))


def test_biases_of_attention_and_mlp_are_served(tmp_path: Path) -> None:
    """The tiny llama has them."""
    path = write_gguf(tmp_path / "m.gguf", tiny_model("llama"), tensors={"blk.1.attn_q.bias": None})
    with pytest.raises(ModelSourceError, match=r"lacks 1 tensor \(blk\.1\.attn_q\.bias\) of a llama model"):
        load_model(str(path))


REFUSED: dict[str, Any] = {
    "attention.clamp_kqv": 8.0,
    "attention.max_alibi_bias": 8.0,
    "attention.scale": 0.5,
    "attention.sliding_window": 16,
    "attention.causal": False,
    "attn_logit_softcapping": 30.0,
    "final_logit_softcapping": 30.0,
    "expert_count": 8,
    "logit_scale": 0.5,
    "residual_scale": 0.22,
    "embedding_scale": 12.0,
    "rope.scaling.type": "dynamic",
    "rope.scaling.attn_factor": 1.2,
    "rope.scaling.yarn_log_multiplier": 0.1,
    "rope.freq_base": 0.0,
    "rope.dimension_count": 6,
    "rope.dimension_sections": [2, 2, 2, 0],
    "attention.value_length": 8,
    "attention.head_count_kv": [2, 2, 4],
    "use_parallel_residual": True,
    "swiglu_clamp_exp": 7.0,
    "a_key_of_tomorrow": 3,
}


@pytest.mark.parametrize("key", REFUSED)
def test_a_key_that_would_change_the_computation_is_refused_by_its_name(key: str, tmp_path: Path) -> None:
    path = write_gguf(tmp_path / "m.gguf", tiny_model("llama"), keys={key: REFUSED[key]})
    with pytest.raises(ModelSourceError, match=rf"llama\.{key.replace('.', '[.]')} = .*not supported") as refused:
        load_model(str(path))
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize(
    "key", ["attention.layer_norm_rms_epsilon", "attention.scale", "rope.freq_base", "rope.scaling.factor"]
)
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_number_that_is_not_finite_is_refused_by_its_key(key: str, value: float, tmp_path: Path) -> None:
    path = write_gguf(tmp_path / "m.gguf", tiny_model("llama"), keys={key: value})
    message = rf"llama\.{re.escape(key)} = {value} is not supported: a finite number"
    with pytest.raises(ModelSourceError, match=message):
        load_model(str(path))


@pytest.mark.parametrize("n", [0, 1 << 31])
def test_a_count_of_blocks_that_the_file_cannot_have_is_refused_before_they_are_listed(n: int, tmp_path: Path) -> None:
    path = write_gguf(tmp_path / "m.gguf", tiny_model("gemma3"), keys={"block_count": n})
    with pytest.raises(
        ModelSourceError, match=rf"gemma3\.block_count = {n} is not supported: the file has \d+ tensors"
    ):
        load_model(str(path))


VOCABULARIES: dict[str, tuple[Any, str]] = {
    "tokenizer.ggml.eos_token_id": (-1, "is -1, which is none of 256 tokens"),
    "tokenizer.ggml.bos_token_id": (256, "is 256, which is none of 256 tokens"),
    "tokenizer.ggml.padding_token_id": (2**32 - 1, "is 4294967295, which is none of 256 tokens"),
    "tokenizer.ggml.unknown_token_id": (1.0, r"is 1\.0, which is none of 256 tokens"),
    "tokenizer.ggml.token_type": ([1] * 255, "has 255 values for 256 tokens"),
    "tokenizer.ggml.scores": (["a"], "is no list of numbers"),
    "tokenizer.ggml.merges": (7, "is no list of strings"),
    "tokenizer.ggml.tokens": ([1, 2], "is no list of strings"),
    "tokenizer.chat_template": (1, "is 1, not a string"),
    "tokenizer.ggml.pre": (["gpt-2"], "is a list of 1, not a string"),
}


@pytest.mark.parametrize("key", VOCABULARIES)
def test_a_vocabulary_that_cannot_be_is_refused_by_its_key(key: str, tmp_path: Path) -> None:
    value, message = VOCABULARIES[key]
    path = write_gguf(tmp_path / "m.gguf", tiny_model("llama"))
    header = read_header(path)
    changed = Header(path, header.values | {key: value}, header.entries, header.metadata)
    with pytest.raises(ModelSourceError, match=rf"{re.escape(key)} {message}"):
        check_vocabulary(changed)


NEUTRAL: dict[str, Any] = {
    "attention.causal": True,
    "attention.clamp_kqv": 0.0,
    "expert_count": 0,
    "logit_scale": 1.0,
    "pooling_type": 0,
    "rope.scaling.finetuned": False,
    "tensor_data_layout": "Meta AI original pth",
    "attention.scale": float(ROTARY_DIM**-0.5),
}


def test_keys_that_change_nothing_are_accepted(tmp_path: Path) -> None:
    model = tiny_model("llama")
    assert_serves(write_gguf(tmp_path / "m.gguf", model, keys=NEUTRAL), model)


@pytest.mark.parametrize("key", ["context_length", "block_count", "attention.layer_norm_rms_epsilon"])
def test_a_key_that_is_missing_is_refused_by_its_name(key: str, tmp_path: Path) -> None:
    path = write_gguf(tmp_path / "m.gguf", tiny_model("llama"), keys={key: None})
    with pytest.raises(ModelSourceError, match=rf"lacks the key llama\.{key}"):
        load_model(str(path))


BROKEN_TENSORS: dict[str, tuple[dict[str, Any], str]] = {
    "one is missing": ({"blk.1.ffn_up.weight": None}, r"lacks 1 tensor \(blk\.1\.ffn_up\.weight\)"),
    "the norm is missing": ({"output_norm.weight": None}, r"lacks 1 tensor \(output_norm\.weight\)"),
    "the embedding is missing": ({"token_embd.weight": None}, r"lacks the tensor token_embd\.weight"),
    "one is unknown": ({"blk.1.attn_sinks.weight": [1.0]}, r"has 1 tensor \(blk\.1\.attn_sinks\.weight\) that"),
    "one is of another shape": (
        {"blk.1.ffn_up.weight": np.ones((80, 40))},
        r"blk\.1\.ffn_up\.weight has shape \[80, 40\], expected \[80, 48\]",
    ),
    "factors are too few": ({"rope_freqs.weight": FACTORS[:4]}, r"rope_freqs\.weight has shape \[4\], expected \[6\]"),
    "factors are half there": ({"rope_factors_long.weight": FACTORS}, "do not go together"),
}


@pytest.mark.parametrize("name", BROKEN_TENSORS)
def test_tensors_that_are_not_those_of_the_model_are_refused_by_name(name: str, tmp_path: Path) -> None:
    tensors, message = BROKEN_TENSORS[name]
    path = write_gguf(tmp_path / "m.gguf", tiny_model("llama"), tensors=tensors)
    with pytest.raises(ModelSourceError, match=message):
        load_model(str(path))


@pytest.mark.parametrize("block", [0, 2])
def test_a_file_without_a_whole_block_is_refused(block: int, tmp_path: Path) -> None:
    model = tiny_model("qwen2")
    names = ("attn_norm", "attn_q", "attn_k", "attn_v", "attn_output", "ffn_norm", "ffn_gate", "ffn_up", "ffn_down")
    gone = dict.fromkeys((f"blk.{block}.{name}.{kind}" for name in names for kind in ("weight", "bias")), None)
    path = write_gguf(tmp_path / "m.gguf", model, tensors=gone)
    with pytest.raises(ModelSourceError, match=rf"lacks 12 tensors \(blk\.{block}\."):
        load_model(str(path))


def test_more_blocks_than_the_file_says_are_refused(tmp_path: Path) -> None:
    path = write_gguf(tmp_path / "m.gguf", tiny_model("qwen2"), keys={"block_count": 2})
    with pytest.raises(ModelSourceError, match=r"has 12 tensors \(blk\.2\..* that a qwen2 model does not use"):
        load_model(str(path))


def test_an_architecture_that_is_not_served_is_refused_by_its_name(tmp_path: Path) -> None:
    path = write_gguf(tmp_path / "m.gguf", tiny_model("llama"))
    path.write_bytes(path.read_bytes().replace(b"llama", b"lfm2x"))
    with pytest.raises(ModelSourceError, match="architecture 'lfm2x' is not supported: llama, qwen2"):
        load_model(str(path))


@pytest.mark.parametrize("seed", range(12))
def test_a_file_with_changed_bytes_is_refused_as_a_model_or_served(seed: int, tmp_path: Path) -> None:
    path, chance = write_gguf(tmp_path / "m.gguf", tiny_model("llama")), random.Random(seed)
    content = bytearray(path.read_bytes())
    for _ in range(20):
        content[chance.randrange(12_000)] = chance.randrange(256)
    path.write_bytes(content)
    # Anything else that is raised fails the test. A change may also hit a name that nobody needs.
    outcome: str | ModelSourceError
    try:
        outcome = load_model(str(path)).info.architecture
    except ModelSourceError as refused:
        outcome = refused
    assert outcome == "llama" or (isinstance(outcome, ModelSourceError) and str(outcome))
