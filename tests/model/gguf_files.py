"""GGUF files of the tiny models, written as llama.cpp's converter writes them: its names, keys and layouts."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from gguf import GGMLQuantizationType, GGUFWriter
from stored_blocks import blocks_like
from tokenizers import pre_tokenizers
from transformers import PreTrainedModel

from patchclamp_server.analysis.documents import inputs_of, pools_for
from patchclamp_server.model.decoder import Decoder, NoHooks
from patchclamp_server.model.load import load_model

# 256 tokens, as many as the tiny models have rows.
VOCABULARY = [*sorted(pre_tokenizers.ByteLevel.alphabet())[:255], "ĠĠ"]
NAMES = {"gemma3_text": "gemma3"}
Keys = Mapping[str, Any]
Formats = Callable[[str], GGMLQuantizationType]


def keys_of(model: PreTrainedModel) -> dict[str, Any]:
    """Below the architecture: shapes and constants, without a scaling."""
    config: Any = model.config
    keys = {
        "context_length": config.max_position_embeddings,
        "embedding_length": config.hidden_size,
        "block_count": config.num_hidden_layers,
        "attention.head_count": config.num_attention_heads,
    }
    if config.model_type == "gpt2":
        return keys | {"feed_forward_length": config.n_inner, "attention.layer_norm_epsilon": config.layer_norm_epsilon}
    keys |= {
        "feed_forward_length": config.intermediate_size,
        "attention.head_count_kv": config.num_key_value_heads,
        "attention.layer_norm_rms_epsilon": config.rms_norm_eps,
    }
    rotary = config.rope_parameters
    keys["rope.freq_base"] = float(rotary.get("full_attention", rotary)["rope_theta"])
    if (head_dim := getattr(config, "head_dim", None)) is not None:
        keys |= {"attention.key_length": head_dim, "attention.value_length": head_dim}
    if getattr(config, "sliding_window", None):
        keys["attention.sliding_window"] = config.sliding_window
    if config.model_type.startswith("gemma"):
        keys["attention.scale"] = config.query_pre_attn_scalar**-0.5
    if config.model_type == "gemma2":
        keys["attn_logit_softcapping"] = config.attn_logit_softcapping
        keys["final_logit_softcapping"] = config.final_logit_softcapping
    if config.model_type == "gemma3_text":
        keys["attention.sliding_window_pattern"] = [kind == "sliding_attention" for kind in config.layer_types]
    return keys


def tensors_of(model: PreTrainedModel) -> dict[str, np.ndarray]:
    """By the names of the file, in its layout."""
    config: Any = model.config
    architecture = NAMES.get(config.model_type, config.model_type)
    arch = next(arch for arch, name in gguf.MODEL_ARCH_NAMES.items() if name == architecture)
    names = gguf.get_tensor_name_map(arch, config.num_hidden_layers)
    tensors = {}
    for path, value in model.state_dict().items():
        if path == "lm_head.weight" and config.tie_word_embeddings:
            continue
        name = names.get_name(path, try_suffixes=(".weight", ".bias"))
        assert name is not None, path
        tensor = value.detach().float()
        if architecture == "llama" and (".attn_q." in name or ".attn_k." in name):
            heads = config.num_attention_heads if ".attn_q." in name else config.num_key_value_heads
            tensor = interleaved(tensor, heads)
        if architecture.startswith("gemma") and name.endswith("norm.weight"):
            tensor = tensor + 1.0
        if architecture == "gpt2" and name.startswith("blk.") and tensor.ndim == 2:
            tensor = tensor.T
        tensors[name] = np.ascontiguousarray(tensor.numpy())
    return tensors


def interleaved(weight: torch.Tensor, heads: int) -> torch.Tensor:
    """Rows of a head in the order of llama.cpp's rotation: 0, half, 1, half + 1, ..."""
    halves = weight.view(heads, 2, weight.shape[0] // heads // 2, *weight.shape[1:])
    return halves.transpose(1, 2).reshape(weight.shape)


def write_gguf(
    path: Path,
    model: PreTrainedModel,
    *,
    keys: Keys | None = None,
    tensors: Mapping[str, Any] | None = None,
    raw: Mapping[str, tuple[np.ndarray, GGMLQuantizationType]] | None = None,
    formats: Formats | None = None,
    tensors_in_a_part: int = 0,
    name: str | None = None,
    template: str | None = None,
    vocabulary: Sequence[str] = VOCABULARY,
) -> Path:
    """`keys` and `tensors` are added to those of the model; None removes one. `formats` says the format of a matrix,
    `raw` has bytes and format of some. With `tensors_in_a_part` the file is split, as llama.cpp splits it. `name` is
    what the file calls itself."""
    config: Any = model.config
    architecture = NAMES.get(config.model_type, config.model_type)
    writer = GGUFWriter(path, architecture, split_max_tensors=tensors_in_a_part)
    if name is not None:
        writer.add_name(name)
    if template is not None:
        writer.add_chat_template(template)
    for key, value in (keys_of(model) | dict(keys or {})).items():
        add(writer, f"{architecture}.{key}", value)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list(vocabulary)
    writer.add_token_types([1] * len(vocabulary))
    writer.add_token_merges(["Ġ Ġ"])
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(1)
    for tensor_name, tensor in (tensors_of(model) | dict(tensors or {})).items():
        if tensor is None:
            continue
        if raw is not None and tensor_name in raw:
            writer.add_tensor(tensor_name, raw[tensor_name][0], raw_dtype=raw[tensor_name][1])
            continue
        values = np.asarray(tensor, dtype=np.float32)
        if formats is None or values.ndim < 2:
            writer.add_tensor(tensor_name, values)
        else:
            kind = formats(tensor_name)
            writer.add_tensor(tensor_name, blocks_like(values, kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def add(writer: GGUFWriter, key: str, value: Any) -> None:
    if isinstance(value, bool):
        writer.add_bool(key, value)
    elif isinstance(value, int):
        writer.add_uint32(key, value)
    elif isinstance(value, float):
        writer.add_float32(key, value)
    elif isinstance(value, str):
        writer.add_string(key, value)
    elif isinstance(value, list):
        writer.add_array(key, value)


def logits_of(decoder: Decoder, ids: torch.Tensor) -> torch.Tensor:
    n = ids.shape[1]
    with torch.inference_mode():
        x = decoder.forward(inputs_of(ids, 0, n, decoder), pools_for(decoder, ids), NoHooks())
        return decoder.logits(x)


def some_ids(n: int = 40) -> torch.Tensor:
    return torch.randint(0, 256, (1, n), generator=torch.Generator().manual_seed(1))


def assert_serves(path: Path, oracle: PreTrainedModel, n: int = 40) -> None:
    """Logits of the file as it is served are those of the oracle."""
    ids = some_ids(n)
    with torch.inference_mode():
        expected = oracle(ids).logits[0]
    torch.testing.assert_close(logits_of(load_model(str(path)).decoder, ids), expected, atol=2e-4, rtol=1e-4)
